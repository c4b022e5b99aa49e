"""Invariants 1 and 10 for image and text apart: one joint pass under a mask; image states know nothing of the text."""

import pytest
import torch

from lightning_mue.backbones import num_layers, view
from lightning_mue.exits import ExitConfig, attach_exits, attached
from lightning_mue.inference import ExitEngine
from lightning_mue.inference.encode import encode
from lightning_mue.inference.stopwatch import Stopwatch
from lightning_mue.policy import ExitPolicy, ExitRule
from tests import reference, zoo

APART = [name for name in zoo.BACKBONES if {"image", "text"} & set(zoo.exit_layers(name))]
IMAGE = 4


def states_of(model, tensors, rules=None):
    """Return stream -> states after each layer, what the decoder reads, and its mask."""
    seen = {}

    def record(stream, _k, state, _before):
        seen.setdefault(stream, []).append(state.h_BTD.clone())

    backbone = view(model)
    with torch.inference_mode():
        memory = encode(
            backbone, attached(model), tensors, rules or {}, Stopwatch(torch.device("cpu"), False), record
        ).memory_BSD
        return seen, memory, backbone.memory_mask(tensors)


def right_padded():
    return zoo.florence2_inputs(3)


def left_padded():
    tensors = zoo.florence2_inputs(3)
    for row, length in enumerate(tensors["attention_mask"].sum(1).tolist()):
        for key in ("input_ids", "attention_mask"):
            tensors[key][row] = tensors[key][row].roll(tensors[key].shape[1] - length)
    return tensors


def image_amid_text():
    tensors = zoo.florence2_inputs(3)
    for row in (0, 1, 2):  # every prompt has two tokens at least
        tensors["input_ids"][row, : zoo.IMAGE_TOKENS + 2] = tensors["input_ids"][row, : zoo.IMAGE_TOKENS + 2].roll(row)
    return tensors


@pytest.mark.parametrize("text_model", ["bart", "mbart"])
@pytest.mark.parametrize("one_way", [False, True])
@pytest.mark.parametrize("layout", [right_padded, left_padded, image_amid_text])
def test_the_memory_is_that_of_a_joint_pass_under_a_mask(text_model, one_way, layout):
    torch.manual_seed(0)
    model, tensors = zoo.tiny_florence2(text_model).eval(), layout()
    attach_exits(model, ExitConfig(image=[1, 2], text_reads_image=one_way))
    _, found, mask = states_of(model, tensors)
    expected = reference.masked_memory(model, tensors, {})
    is_image = tensors["input_ids"] == IMAGE
    order = [[*is_image[row].nonzero()[:, 0], *(~is_image[row]).nonzero()[:, 0]] for row in range(3)]
    valid = tensors["attention_mask"].bool()
    assert not valid.all()
    for row in range(3):
        at = torch.stack(order[row])
        assert (mask[row, 0, 0] == 0).tolist() == valid[row, at].tolist()
        real = valid[row, at]
        torch.testing.assert_close(found[row][real], expected[row, at][real], rtol=1e-4, atol=1e-4)
    joint = model.model(**tensors, decoder_input_ids=torch.tensor([[zoo.START]] * 3)).encoder_last_hidden_state
    assert not torch.allclose(joint[valid], expected[valid], atol=1e-2), "the mask changes nothing"


@pytest.mark.parametrize("name", APART)
def test_image_states_do_not_depend_on_the_text(name):
    model, tensors = zoo.shared(name), zoo.inputs(name, 3)
    before, *_ = states_of(model, tensors)
    other = zoo.inputs(name, 3, seed=5)
    long = zoo.florence2_inputs(3, seed=7, prompt=11)
    for text in (other, long):
        after, *_ = states_of(model, text | {"pixel_values": tensors["pixel_values"]})
        assert all(torch.equal(a, b) for a, b in zip(before["image"], after["image"], strict=True))
    after, *_ = states_of(model, tensors | {"pixel_values": other["pixel_values"]})
    assert not torch.equal(before["image"][0], after["image"][0])
    same = [torch.equal(a, b) for a, b in zip(before["text"], after["text"], strict=True)]
    assert set(same) == {zoo.exit_config(name).encoder_kind == "decomposed"}


@pytest.mark.parametrize("name", APART)
def test_the_depth_of_the_image_reaches_text_that_reads_it(name):
    model, tensors = zoo.shared(name), zoo.inputs(name, 3)
    before, *_ = states_of(model, tensors)
    after, *_ = states_of(model, tensors, {"image": ExitRule.static(1)})
    same = [torch.equal(a, b) for a, b in zip(before["text"], after["text"], strict=True)]
    assert set(same) == {zoo.exit_config(name).encoder_kind == "decomposed"}


@pytest.mark.parametrize("name", APART)
def test_rows_with_different_numbers_of_image_tokens_are_refused(name):
    model, tensors = zoo.shared(name), zoo.inputs(name, 2)
    tensors["input_ids"][0, 0], tensors["input_ids"][1, zoo.IMAGE_TOKENS] = 9, IMAGE
    with pytest.raises(ValueError, match=r"as many image tokens as the others, got \[4, 6\]"):
        ExitEngine(model, ExitPolicy.full_depth()).generate(**tensors)


@pytest.mark.parametrize("name", APART)
def test_a_modality_without_tokens_is_refused(name):
    model, tensors = zoo.shared(name), zoo.inputs(name, 2)
    first, rest = slice(zoo.IMAGE_TOKENS), slice(zoo.IMAGE_TOKENS, None)
    for part, found in ((first, "5 image tokens of 5"), (rest, "0 image tokens of 6")):
        only = tensors | {key: tensors[key][:, part] for key in ("input_ids", "attention_mask")}
        with pytest.raises(ValueError, match=f"must hold image and text, got {found}"):
            ExitEngine(model, ExitPolicy.full_depth()).generate(**only)


def test_naming_image_or_text_decomposes():
    for config, kind in (
        ({"encoder": [1]}, "joint"),
        ({"decoder": [1]}, "joint"),
        ({"image": [1]}, "decomposed"),
        ({"text": [1]}, "decomposed"),
        ({"text": [1], "text_reads_image": True}, "one-way"),
    ):
        model = zoo.tiny_florence2()
        attach_exits(model, config)
        assert attached(model).config.encoder_kind == kind
        expected = ["encoder"] if kind == "joint" else ["image", "text"]
        assert list(num_layers(view(model))) == ["vision", *expected, "decoder"]
    for config in ({"encoder": [1], "image": [1]}, {"encoder": [1], "text": [1], "text_reads_image": True}):
        with pytest.raises(ValueError, match="`image` and `text` each alone: name one or the other"):
            attach_exits(zoo.tiny_florence2(), config)
    with pytest.raises(ValueError, match="`text_reads_image` needs a decomposed encoder"):
        attach_exits(zoo.tiny_florence2(), {"encoder": [1], "text_reads_image": True})
