"""T5Gemma 2: windows, positions, where the picture stands, capped logits, what is never read, and what is refused."""

import pytest
import torch

from lightning_mue.backbones import backbone_config, build_backbone, fingerprint, view
from lightning_mue.backbones.stream import causal_mask
from lightning_mue.exits import attached
from lightning_mue.inference import ExitEngine
from lightning_mue.policy import ExitPolicy
from lightning_mue.training import Supervision
from lightning_mue.training.depths import Step
from lightning_mue.training.objective import objective
from lightning_mue.training.supervised import supervise
from tests import reference, zoo
from tests.backbones.test_seq2seq import says_what_transformers_says

NAME = "t5gemma2"
LABELS = torch.randint(5, zoo.VOCABULARY, (3, 6), generator=torch.Generator().manual_seed(3))
LONG = {"sliding_attention": {"rope_type": "yarn", "rope_theta": 50.0, "factor": 4.0}}
CHANGED = {
    "even window": {"sliding_window": 4},
    "wide window": {"sliding_window": 64},
    "two alone": {"sliding_window": 2},
    "a key for all": {"num_key_value_heads": 1},
    "a key each": {"num_key_value_heads": 4},
    "yarn": {"rope_parameters": LONG | {"full_attention": {"rope_type": "default", "rope_theta": 20.0}}},
    "capped": {"final_logit_softcapping": 2.0},
    "biases": {"attention_bias": True},
}


def changed(**settings):
    """The zoo's model with other settings of both stacks, and its weights where they fit."""
    torch.manual_seed(0)
    made = zoo.make(NAME, exits=False)
    config = backbone_config(made)
    config["decoder"] |= settings
    config["encoder"]["text_config"] |= settings
    model = build_backbone(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            old = made.state_dict().get(name)
            if old is not None and old.shape == parameter.shape:
                parameter.copy_(old)
            elif name.endswith("bias"):
                parameter.normal_(std=0.3)
    return model.requires_grad_(False).eval()


def answers(model, tensors, runtime="torch", **how):
    engine = ExitEngine(model, ExitPolicy.full_depth(), runtime=runtime)
    return engine.generate(**tensors, **how).sequences.tolist()


@pytest.mark.parametrize("what", CHANGED)
def test_other_settings_say_what_transformers_says(what):
    """Prompts and answers are longer than all windows but one."""
    model, tensors = changed(**CHANGED[what]), zoo.inputs(NAME, 3)
    expected = says_what_transformers_says(model, tensors, 5)
    if what != "capped":
        assert answers(model, tensors, "onnxruntime") == expected


def test_settings_matter():
    """Else the test above would not see them."""
    tensors, model = zoo.inputs(NAME, 3), zoo.make(NAME, exits=False)
    ids = torch.full((3, 12), 9)
    plain = model(**tensors, decoder_input_ids=ids).logits
    for what in ("even window", "wide window", "two alone", "yarn", "capped"):
        other = changed(**CHANGED[what])(**tensors, decoder_input_ids=ids).logits
        assert (plain - other).abs().max() > 0.1, what


@pytest.mark.parametrize("window", [1, 3, 5, 9])
@pytest.mark.parametrize(("first", "last"), [(0, 1), (4, 5), (0, 7), (3, 7)])
def test_the_mask_of_a_window(first, last, window):
    mask = causal_mask(first, last, torch.float32, torch.device("cpu"), window=window)
    seen = torch.tensor([[0 <= q - k < window for k in range(last)] for q in range(first, last)])
    if mask is None:
        assert bool(seen.all())
        assert last - first == 1
    else:
        assert torch.equal(mask[0, 0] == 0, seen)


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_on_either_side_is_transformers(side, runtime):
    """Its encoder's positions count padding; nothing else may see it."""
    model, tensors = zoo.shared(NAME), zoo.inputs(NAME, 3)
    for row in range(3):
        valid = tensors["attention_mask"][row].bool()
        front = {"left": int((~valid).sum()), "right": 0, "both": int((~valid).sum()) // 2}[side]
        for name in ("input_ids", "attention_mask"):
            tensors[name][row] = tensors[name][row].roll(front)
    assert answers(model, tensors, runtime) == reference.generate(model, tensors).tolist()


@pytest.mark.parametrize("shift", [1, 3], ids=["after a word", "after three"])
def test_the_picture_stands_where_its_tokens_are(shift):
    """Also amid the words, and elsewhere in each row; the token that ends a picture has an embedding of its own."""
    model, tensors = zoo.shared(NAME), zoo.inputs(NAME, 3)
    tensors["attention_mask"] = torch.ones_like(tensors["attention_mask"])
    tensors["input_ids"][:, 4:].clamp_(min=5)
    tensors["input_ids"][:, 4] = 5
    tensors["input_ids"] = torch.stack([row.roll(shift * r) for r, row in enumerate(tensors["input_ids"])])
    expected = reference.generate(model, tensors)
    assert answers(model, tensors) == expected.tolist()
    other = tensors | {"pixel_values": tensors["pixel_values"].flip(0)}
    assert answers(model, other) != expected.tolist()


def test_full_depth_has_the_models_own_loss():
    model, tensors = zoo.make(NAME), zoo.inputs(NAME, 3)
    found = supervise(view(model), attached(model), tensors, LABELS, {}).last.loss
    torch.testing.assert_close(found, model(**tensors, labels=LABELS).loss)


def test_all_that_learns_gets_a_gradient():
    """Else distributed training would wait for it."""
    model, tensors = zoo.make(NAME).train(), zoo.inputs(NAME, 3)
    tensors["input_ids"][:, -1] = 5
    objective(view(model), attached(model), tensors, LABELS, Step(), Supervision()).total.backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_the_pooling_of_its_vision_tower_is_no_part_of_the_fingerprint():
    model, tensors = zoo.make(NAME, exits=False), zoo.inputs(NAME, 2)
    before = fingerprint(model), reference.generate(model, tensors).tolist()
    with torch.no_grad():
        for parameter in model.model.encoder.vision_tower.head.parameters():
            assert not parameter.requires_grad
            parameter.add_(1)
    assert (fingerprint(model), reference.generate(model, tensors).tolist()) == before


def test_capped_logits_stay_in_torch():
    model, tensors = changed(final_logit_softcapping=2.0), zoo.inputs(NAME, 2)
    with pytest.raises(ValueError, match=r"`final_logit_softcapping` is 2\.0.* take runtime='torch'"):
        answers(model, tensors, "onnxruntime")
    assert ExitEngine(model, ExitPolicy.full_depth(), runtime="auto").runtime == "torch"
    beams = reference.generate(model, tensors, num_beams=3)  # whose scores the cap changes
    assert answers(model, tensors, num_beams=3) == beams.tolist()
    rows = view(model).decoder.head_rows(torch.tensor([7, 9]))
    h = torch.randn(4, 32)
    torch.testing.assert_close(rows(h), view(model).decoder.head(h)[:, [7, 9]])


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotations_that_change_with_the_length_are_refused(kind):
    model = zoo.make(NAME, exits=False)
    model.model.decoder.rotary_emb.rope_type["full_attention"] = kind
    with pytest.raises(ValueError, match=rf"`rope_parameters\['full_attention'\]` are of type '{kind}'.* 'yarn'"):
        view(model)


def test_what_cannot_be_read_is_refused():
    model, tensors = zoo.make(NAME), zoo.inputs(NAME, 2)
    with pytest.raises(ValueError, match=r"give `pixel_values`, \[B, 3, H, W\]"):
        answers(model, {name: tensors[name] for name in ("input_ids", "attention_mask")})
    tensors["input_ids"][1, 0] = 9
    with pytest.raises(ValueError, match=r"token \(4\) as often as a picture has tokens, 4 times; got \[4, 3\]"):
        answers(model, tensors)
    with pytest.raises(ValueError, match="must not pass the decoder's 64 positions, got 70"):
        answers(model, zoo.inputs(NAME, 2), max_new_tokens=70)
