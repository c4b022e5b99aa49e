"""Embeddings: open_clip's own at full depth; a shorter tower's where they leave; alone and in a batch."""

import pytest
import torch
from torch.nn.functional import normalize

from lightning_mue.backbones import view
from lightning_mue.exits import attached
from lightning_mue.inference.embedding import EmbedEngine
from lightning_mue.policy import ExitPolicy, ExitRule
from tests import reference, zoo

ROWS = 5


def texts(seed=0, rows=ROWS):
    """Texts of several lengths, padded on the right."""
    ids = torch.randint(5, zoo.VOCABULARY, (rows, 9), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = zoo.START
    for row, length in enumerate((9, 4, 7, 2, 9)[:rows]):
        ids[row, length - 1], ids[row, length:] = zoo.END, zoo.PAD
    return ids


@pytest.fixture
def model():
    return zoo.shared("coca")


@torch.no_grad()
def test_at_full_depth_they_are_open_clips(model):
    engine, pixels, ids = EmbedEngine(model, ExitPolicy.full_depth()), zoo.inputs("coca", ROWS)["pixel_values"], texts()
    torch.testing.assert_close(engine.images(pixels).vectors, model.coca.encode_image(pixels), rtol=1e-5, atol=1e-6)
    padded = torch.nn.functional.pad(ids, (0, 64 - ids.shape[1]), value=zoo.PAD)  # as open_clip's tokenizer does
    torch.testing.assert_close(engine.texts(ids).vectors, model.coca.encode_text(padded), rtol=1e-5, atol=1e-6)
    out = model.coca(pixels, padded)
    expected = out["logit_scale"] * out["image_features"] @ out["text_features"].T
    found = view(model).contrastive.logits(engine.images(pixels).vectors, engine.texts(ids).vectors)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert engine.texts(ids).depths.tolist() == [2] * ROWS


@torch.no_grad()
@pytest.mark.parametrize("k", zoo.exit_layers("coca")["vision"])
def test_pictures_leave_as_from_a_shorter_tower(model, k):
    pixels = zoo.inputs("coca", ROWS)["pixel_values"]
    found = EmbedEngine(model, ExitPolicy({"vision": ExitRule.static(k)})).images(pixels)
    with reference.left_after(model, "vision", k):
        expected = model.coca.encode_image(pixels)
    torch.testing.assert_close(found.vectors, expected, rtol=1e-5, atol=1e-6)
    assert found.depths.tolist() == [k] * ROWS


@torch.no_grad()
def test_texts_leave_as_from_a_shorter_tower(model):
    ids, tower = torch.nn.functional.pad(texts(), (0, 55), value=zoo.PAD), model.coca.text
    found = EmbedEngine(model, ExitPolicy({"text": ExitRule.static(1)})).texts(ids)
    whole, adapt = tower.transformer.resblocks, attached(model).adapt
    hook = whole[0].register_forward_hook(lambda _l, _a, h_BTD: adapt("text", 1, h_BTD))
    tower.transformer.resblocks = whole[:1]
    try:
        expected = normalize(tower(ids)[0], dim=-1)
    finally:
        hook.remove()
        tower.transformer.resblocks = whole
    torch.testing.assert_close(found.vectors, expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("signal", ["similarity", "gate"])
def test_a_batch_is_its_rows_one_by_one(model, signal):
    """Of texts also without the padding that others need: [CLS] stands after it."""
    pixels, ids = zoo.inputs("coca", ROWS)["pixel_values"], texts()
    scores = {"similarity": (0.9, 0.95, 0.97), "gate": (0.5, 0.5, 0.5)}[signal]
    rules = {"vision": ExitRule(signal, (1, 2, 3), scores), "text": ExitRule(signal, (1,), scores[:1])}
    engine = EmbedEngine(model, ExitPolicy(rules))
    together, words = engine.images(pixels), engine.texts(ids)
    for row in range(ROWS):
        alone, length = engine.images(pixels[row : row + 1]), int((ids[row] != zoo.PAD).sum())
        torch.testing.assert_close(together.vectors[row], alone.vectors[0], rtol=1e-5, atol=1e-6)
        assert together.depths[row] == alone.depths[0]
        same = engine.texts(ids[row : row + 1, :length])
        torch.testing.assert_close(words.vectors[row], same.vectors[0], rtol=1e-5, atol=1e-6)
        assert words.depths[row] == same.depths[0]


@torch.no_grad()
def test_the_unimodal_half_does_not_see_the_picture(model):
    """Design, property 10: its states are the same beside any picture, and those of the text tower."""
    ids, states = texts()[:, :6], []
    for seed in (0, 1):
        pixels = zoo.inputs("coca", ROWS, seed)
        states.append(reference.decoder_states(model, pixels, ids)[0])
    first = view(model).decoder.first_exit
    for k in range(first):
        assert torch.equal(states[0][k], states[1][k])
    assert not torch.allclose(states[0][first], states[1][first])


def test_what_is_refused(model):
    with pytest.raises(ValueError, match="compares no pictures with texts"):
        EmbedEngine(zoo.shared("florence2"), ExitPolicy())
    with pytest.raises(ValueError, match="the policy asks for 'int8'"):
        EmbedEngine(model, ExitPolicy(precision="int8"))
    with pytest.raises(ValueError, match="fingerprint"):
        EmbedEngine(model, ExitPolicy(fingerprint="of another"))
    engine = EmbedEngine(model, ExitPolicy())
    with pytest.raises(ValueError, match="at most 64 tokens, start and end included, got 70"):
        engine.texts(torch.ones(1, 70, dtype=torch.long))
    with pytest.raises(ValueError, match="no processor"):
        engine.embed_texts(["a"])
    for wrong in ("a red square", []):
        with pytest.raises(ValueError, match="`texts` must be a list of at least one text"):
            engine.embed_texts(wrong)
    with pytest.raises(ValueError, match=r"for the groups \['a'\] alone; embeddings have none"):
        EmbedEngine(model, ExitPolicy(groups=("a",)))
