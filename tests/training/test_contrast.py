"""The contrastive loss: open_clip's own, equal texts left out, every exit of the texts, several processes."""

import math
from functools import partial

import open_clip
import pytest
import torch
from torch.nn.functional import normalize

from lightning_mue.backbones import view
from lightning_mue.backbones.contrastive import text_ids
from lightning_mue.exits import attached
from lightning_mue.training.contrast import (
    contrast,
    equal_rows,
    gathered,
    gathered_texts,
    info_nce,
    pair,
    text_embeddings,
    text_states,
)
from lightning_mue.training.depths import Step
from lightning_mue.training.losses import exit_weights
from lightning_mue.training.objective import objective
from lightning_mue.training.pairs import FULL_DEPTH, Pairs, check_contrast
from lightning_mue.training.supervised import encode, supervise
from lightning_mue.training.supervision import Supervision
from tests import ranks, zoo
from tests.training.test_objective import watch_gate_loss
from tests.training.test_supervised import batch_of


def unit(*shape, seed=0):
    return normalize(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_without_equal_texts_it_is_open_clips():
    image, text, scale = unit(6, 8), unit(6, 8, seed=1), torch.tensor(14.0)
    expected = open_clip.ClipLoss()(image, text, scale)
    torch.testing.assert_close(info_nce(scale * image @ text.T, torch.eye(6, dtype=torch.bool)), expected)


def test_equal_texts_are_no_negatives():
    """By hand: pictures 0 and 2 show the same text, and neither is asked to tell it from the other's."""
    logits = torch.randn(3, 3, generator=torch.Generator().manual_seed(2))
    found = info_nce(logits, equal_rows(torch.tensor([[5, 6], [5, 7], [5, 6]])))
    e = logits.exp()
    ways = [
        -math.log(e[0, 0] / (e[0, 0] + e[0, 1])),
        -math.log(e[1, 1] / e[1].sum()),
        -math.log(e[2, 2] / (e[2, 1] + e[2, 2])),
        -math.log(e[0, 0] / (e[0, 0] + e[1, 0])),
        -math.log(e[1, 1] / e[:, 1].sum()),
        -math.log(e[2, 2] / (e[1, 2] + e[2, 2])),
    ]
    assert found.item() == pytest.approx(sum(ways) / 6, rel=1e-5)


def test_at_full_depth_it_is_open_clips_coca_loss():
    """Captioning and contrast of the same batch, with CoCa's weights."""
    model = zoo.make("coca")
    tensors, labels = batch_of("coca")
    ids = text_ids(labels, zoo.START, view(model).contrastive)
    assert ids.shape[1] == 64  # as open_clip's tokenizer pads
    out = model.coca(tensors["pixel_values"], ids)
    expected = open_clip.CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0, pad_id=zoo.PAD)(**out)
    backbone, exits = view(model), attached(model)
    found = supervise(backbone, exits, tensors, labels, {})
    losses = contrast(backbone.contrastive, pair(backbone.contrastive, exits, found.left["vision"], labels, zoo.START))
    torch.testing.assert_close(losses[2], expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(2 * found.last.loss, expected[1], rtol=1e-4, atol=1e-5)


def test_texts_are_compared_at_every_exit():
    model = zoo.make("coca")
    tensors, labels = batch_of("coca")
    backbone, exits = view(model), attached(model)
    plain, with_contrast = (
        objective(backbone, exits, tensors, labels, Step({"vision": 2}), Supervision(gate_weight=0.0, contrast=weight))
        for weight in (0.0, 0.5)
    )
    _, _, left = encode(backbone, exits, tensors, {"vision": 2})
    contrastive, expected = backbone.contrastive, {}
    image = contrastive.image_embedding(left["vision"])
    states = text_states(contrastive, exits, text_ids(labels, zoo.START, contrastive))
    for k, text in text_embeddings(contrastive, exits, states).items():
        expected[k] = open_clip.ClipLoss()(image, text, model.coca.logit_scale.exp())
    assert list(with_contrast.contrast) == [1, 2]
    for k, loss in expected.items():
        torch.testing.assert_close(with_contrast.contrast[k], loss)
    weighted = sum(w * loss for w, loss in zip(exit_weights("avg+last", (1, 2)), expected.values(), strict=True))
    torch.testing.assert_close(with_contrast.total, plain.total + 0.5 * weighted)
    assert plain.contrast == {}


def test_both_towers_and_the_temperature_learn_of_it():
    model = zoo.make("coca")
    tensors, labels = batch_of("coca")
    how = Supervision(gate_weight=0.0, contrast=0.5)
    objective(view(model), attached(model), tensors, labels, Step({"vision": 1}), how).total.backward()
    coca, exits = model.coca, attached(model)
    for parameter in (
        coca.logit_scale,
        coca.text.cls_emb,
        coca.text.text_projection,
        coca.visual.proj,
        *exits.adapters["text_1"].parameters(),
        *exits.adapters["vision_1"].parameters(),
    ):
        assert parameter.grad.abs().sum() > 0


def test_the_gates_of_texts_are_told_whether_the_picture_is_lost(monkeypatch):
    """By hand, of open_clip's embeddings: among the batch's pictures, twins of the same text left out."""
    model, size = zoo.make("coca"), 24
    tensors, labels = batch_of("coca", size)
    labels[7] = labels[9]
    seen = watch_gate_loss(monkeypatch)
    objective(view(model), attached(model), tensors, labels, Step(), Supervision(contrast=0.5, gate_balance=False))
    logits, safe, balance = seen[0]
    ids, tower = text_ids(labels, zoo.START, view(model).contrastive), model.coca.text
    with torch.no_grad():
        pictures, full = model.coca.encode_image(tensors["pixel_values"]), model.coca.encode_text(ids)
        early, hidden = _after_one(model, tower, ids)
    found = []
    for texts in (early, full):
        cosines = texts @ pictures.T
        cosines[7, 9] = cosines[9, 7] = -2.0
        found.append([bool((row <= row[i]).all()) for i, row in enumerate(cosines)])
    expected = [at_exit or not whole for at_exit, whole in zip(*found, strict=True)]
    assert safe.tolist() == expected
    assert 0 < sum(expected) < size
    assert not balance
    gate = attached(model).gates["text_1"]
    for row, own in enumerate(ids != zoo.PAD):
        mean = hidden[row, [*own.nonzero()[:, 0].tolist(), 64]].mean(0)
        torch.testing.assert_close(logits[row], gate(mean), rtol=1e-4, atol=1e-5)


def _after_one(model, tower, ids):
    """Embeddings of texts, and the states they are made of, if the tower had one layer and the exit's adapter."""
    whole, states = tower.transformer.resblocks, []
    adapt = attached(model).adapt
    hook = whole[0].register_forward_hook(lambda _l, _a, h_BTD: states.append(h_BTD) or adapt("text", 1, h_BTD))
    tower.transformer.resblocks = whole[:1]
    try:
        return normalize(tower(ids)[0], dim=-1), states[0]
    finally:
        hook.remove()
        tower.transformer.resblocks = whole


def test_the_gates_of_texts_learn_from_pictures_at_full_depth_alone():
    model = zoo.make("coca")
    tensors, labels = batch_of("coca")
    how, learned = Supervision(contrast=0.5), {}
    for depths in ({}, {"vision": 1}):
        model.zero_grad()
        objective(view(model), attached(model), tensors, labels, Step(depths), how).total.backward()
        grads = [p.grad.abs().sum() for p in attached(model).gates["text_1"].parameters()]
        learned[bool(depths)] = bool(sum(grads) > 0)
    assert learned == {False: True, True: False}


def _parts():
    image, text = unit(6, 8), unit(6, 8, seed=1)
    ids = torch.tensor([[5, 6, 0], [5, 7, 0], [5, 6, 0], [5, 8, 9], [5, 7, 0], [5, 9, 9]])
    return image, text, ids


def one_rank(folder):
    """What each process of the next test does."""
    with ranks.group():
        whole, words, numbers = _parts()
        mine = slice(3 * ranks.my_rank(), 3 * ranks.my_rank() + 3)
        here = whole[mine].requires_grad_()
        loss = info_nce(gathered(here) @ gathered(words[mine]).T, equal_rows(gathered_texts(numbers[mine])))
        loss.backward()
        torch.save((loss.detach(), here.grad), f"{folder}/{ranks.my_rank()}.pt")


def test_several_processes_compare_with_all_of_them(tmp_path):
    """Their losses are that of one process with the whole batch, and so are the gradients that they share."""
    image, text, ids = _parts()
    image.requires_grad_()
    expected = info_nce(image @ text.T, equal_rows(ids))
    expected.backward()
    codes, logs = ranks.run(tmp_path, 2, partial(one_rank, tmp_path), fresh=True)
    assert codes == [0, 0], logs
    for k in range(2):
        loss, grad = torch.load(tmp_path / f"{k}.pt")
        torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(grad / 2, image.grad[3 * k : 3 * k + 3])  # DDP takes the mean over processes


def test_batches_of_different_sizes_are_refused_everywhere(tmp_path):
    def rank():
        with ranks.group(), pytest.raises(ValueError, match=r"one size on all ranks, got \[3, 4\]"):
            gathered_texts(torch.ones(3 + ranks.my_rank(), 5, dtype=torch.long))

    codes, logs = ranks.run(tmp_path, 2, rank)
    assert codes == [0, 0], logs


def test_texts_that_are_too_long_are_refused():
    contrastive = view(zoo.shared("coca")).contrastive
    assert text_ids(torch.full((1, 63), 7), zoo.START, contrastive).shape == (1, 64)
    with pytest.raises(ValueError, match="at most 64 tokens, start and end included, got 65"):
        text_ids(torch.full((1, 64), 7), zoo.START, contrastive)


def test_equal_texts_are_one_whatever_stands_beside_them():
    """Two batches with the same pictures and texts, of other widths: each text is found, as its own or as its twin."""
    model = zoo.make("coca")
    backbone, exits = view(model), attached(model)
    tensors, pairs = zoo.inputs("coca", 2), Pairs(backbone, exits)
    for width in (3, 6):
        labels = torch.full((2, width), -100)
        labels[:, :3] = torch.tensor([[7, 8, zoo.END], [9, 9, zoo.END]])
        found = supervise(backbone, exits, tensors, labels, {})
        pairs.see(backbone, exits, {"": found}, labels, zoo.START)
    assert len({*torch.cat(pairs[FULL_DEPTH].text_id).tolist()}) == 2


@pytest.mark.parametrize(
    ("name", "contrast", "message"),
    [("florence2", 0.5, "is for backbones that compare"), ("coca", 0.0, "learn from the contrastive loss alone")],
)
def test_settings_that_do_not_fit(name, contrast, message):
    model = zoo.make(name)
    with pytest.raises(ValueError, match=message):
        check_contrast(Supervision(contrast=contrast), view(model), attached(model))
