"""A bundle of graphs answers as the model does: the same tokens, exit depths and work, whatever the policy."""

import numpy as np
import pytest
import torch

from lightning_mue.exits import attached
from lightning_mue.inference import ExitEngine
from lightning_mue.inference.answers import only_answers
from lightning_mue.policy import KV_FILLS, ExitPolicy, ExitRule
from lightning_mue.portable import files
from lightning_mue.portable.engine import PortableEngine
from tests import reference, zoo
from tests.invariants.policies import CLOSED, STEPS, decoder_rule, encoder_rules, mixed
from tests.portable.conftest import make_frozen
from tests.promises import certificate

pytestmark = pytest.mark.slow
ROWS = 5
SIGNALS = ("similarity", "flat_similarity", "gate", "confidence", "margin", "entropy", "patience")


def both(frozen, policy, tensors, *args, **more):
    """Answer with the model and with the bundle."""
    engine, arrays = frozen.engine, {name: tensor.numpy() for name, tensor in tensors.items()}
    engine.policy = policy
    expected = ExitEngine(frozen.model, policy).generate(*args, **more, **tensors)
    return expected, engine.generate(*args, **more, **arrays)


def assert_same(expected, found):
    assert found.sequences.tolist() == expected.sequences.tolist()
    assert found.exit_depths.keys() == expected.exit_depths.keys()
    for stream, depths in expected.exit_depths.items():
        assert found.exit_depths[stream].tolist() == depths.tolist()
    assert found.prompt_lengths.tolist() == expected.prompt_lengths.tolist()
    assert (found.pairs, found.filled) == (expected.pairs, expected.filled)
    assert found.layer_runs == expected.layer_runs


def prompted(tensors):
    """Decoder prompts of several lengths."""
    prompts = torch.randint(5, zoo.VOCABULARY, (ROWS, 4), generator=torch.Generator().manual_seed(3))
    for row, length in enumerate((4, 1, 3, 1, 2)):
        prompts[row, length:] = -100
    return tensors | {"decoder_prompt": prompts}


def leaves_early(found, stream):
    return len({*found.exit_depths[stream].flatten().tolist()} - {0}) > 1


@pytest.mark.parametrize("signal", SIGNALS)
def test_signals(frozen, signal):
    tensors = zoo.inputs(frozen.name, ROWS)
    policy = mixed(frozen.model, frozen.name, tensors, signal)
    allowed = (lambda _row, _ids: list(CLOSED)) if signal == "patience" else None
    expected, found = both(frozen, policy, tensors, STEPS, allowed)
    assert_same(expected, found)
    assert all(leaves_early(expected, stream) for stream in policy.rules if signal != "flat_similarity")


def test_full_depth_and_static_depths(frozen):
    tensors = prompted(zoo.inputs(frozen.name, ROWS))
    assert_same(*both(frozen, ExitPolicy.full_depth(), tensors))
    for stream, layers in zoo.exit_layers(frozen.name).items():
        assert_same(*both(frozen, ExitPolicy({stream: ExitRule.static(layers[0])}), tensors))


def test_without_a_mask_and_one_by_one(frozen):
    tensors = zoo.inputs(frozen.name, 1)
    tensors.pop("attention_mask", None)
    assert_same(*both(frozen, mixed(frozen.model, frozen.name, zoo.inputs(frozen.name, ROWS)), tensors))


@pytest.mark.parametrize("fill", KV_FILLS)
def test_decoder_prompts_decay_and_fills(frozen, fill):
    tensors = zoo.inputs(frozen.name, ROWS)
    policy = mixed(frozen.model, frozen.name, tensors, decay=(0.7, 4.0), from_step=1, kv_fill=fill)
    assert_same(*both(frozen, policy, prompted(tensors), STEPS))


def test_verified(frozen):
    tensors = zoo.inputs(frozen.name, ROWS)
    rule = decoder_rule(frozen.model, frozen.name, tensors, "gate", 0.9)
    expected, _ = both(frozen, ExitPolicy.full_depth(), tensors, STEPS)
    _, found = both(frozen, ExitPolicy({"decoder": rule}, verified=True), tensors, STEPS)
    assert found.sequences.tolist() == expected.sequences.tolist()


@pytest.mark.parametrize("signal", ["gate", "confidence"])
def test_closed_answers_score_their_own_rows_alone(frozen, signal, monkeypatch):
    tensors, allowed = prompted(zoo.inputs(frozen.name, ROWS)), only_answers([[11], [23, 42], [23, 5, 6], [77]], 3)
    policy = mixed(frozen.model, frozen.name, zoo.inputs(frozen.name, ROWS), signal)
    full = ExitEngine(frozen.model, policy).generate(STEPS, allowed, **tensors)
    engine = frozen.engine
    engine.policy = policy
    for head in ("head", "greedy_head"):
        monkeypatch.setattr(type(engine._decoder), head, property(lambda _: pytest.fail("all tokens were scored")))
    assert_same(full, engine.generate(STEPS, allowed, **{name: t.numpy() for name, t in tensors.items()}))


@pytest.mark.parametrize(
    "settings",
    [{"no_repeat_ngram_size": 2}, {"forced_bos_token_id": 9}, {"forced_eos_token_id": 3}],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_of_generation(frozen, settings, monkeypatch):
    tensors = prompted(zoo.inputs(frozen.name, ROWS))
    policy = mixed(frozen.model, frozen.name, zoo.inputs(frozen.name, ROWS))
    engine = frozen.engine
    engine.policy = policy
    for name, value in settings.items():
        monkeypatch.setitem(engine.files.facts["decode"], name, value)
        monkeypatch.setattr(frozen.model.generation_config, name, value)
    assert_same(
        ExitEngine(frozen.model, policy).generate(7, **tensors),
        engine.generate(7, **{name: tensor.numpy() for name, tensor in tensors.items()}),
    )


def test_beams(frozen):
    tensors = prompted(zoo.inputs(frozen.name, ROWS))
    for policy in (ExitPolicy(), mixed(frozen.model, frozen.name, zoo.inputs(frozen.name, ROWS), "confidence")):
        assert_same(*both(frozen, policy, tensors, 7, num_beams=3, length_penalty=2.0, early_stopping=True))


@pytest.mark.parametrize("how", [{}, {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "seed": [4, 5, 6, 7, 8]}])
def test_samples(frozen, how):
    tensors = prompted(zoo.inputs(frozen.name, ROWS))
    rules = mixed(frozen.model, frozen.name, zoo.inputs(frozen.name, ROWS), "gate").rules
    for policy in (ExitPolicy(rules), ExitPolicy({"decoder": rules["decoder"]}, verified=True)):
        engine = frozen.engine
        engine.policy = policy
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        expected = ExitEngine(frozen.model, policy).generate(7, do_sample=True, **how, **tensors)
        assert engine.generate(7, do_sample=True, **how, **arrays).sequences.tolist() == expected.sequences.tolist()


def test_settings_are_written(frozen):
    facts = frozen.engine.files.facts
    assert facts["decode"] == ExitEngine(frozen.model, ExitPolicy()).backbone.decode_settings(None).plain


def test_groups_and_what_was_certified(frozen):
    tensors = zoo.inputs(frozen.name, ROWS)
    rules = encoder_rules(frozen.model, frozen.name, tensors) | {
        "decoder": ExitRule.static(zoo.exit_layers(frozen.name)["decoder"][0])
    }
    policy = ExitPolicy(rules, groups=("a",), certificate=certificate(decode={"max_new_tokens": 4}))
    expected, found = both(frozen, policy, tensors, groups=["a", "b", "a", "c", "b"])
    assert_same(expected, found)
    assert found.sequences.shape[1] <= 5
    assert found.exit_depths["decoder"][1].max() > 1
    with pytest.raises(ValueError, match="`groups` must name one for each of 5 rows"):
        both(frozen, policy, tensors, groups=["a"])


def test_timings(frozen):
    frozen.engine.policy = ExitPolicy()
    out = frozen.engine.generate(2, timings=True, **{k: t.numpy() for k, t in zoo.inputs(frozen.name, 2).items()})
    streams = [stream for stream in zoo.exit_layers(frozen.name) if stream != "decoder"]
    assert {"total", "embed", "layers", "memory", "head", *streams} <= set(out.timings)


def test_8_bits_are_those_of_the_runtime(tmp_path, monkeypatch):
    """The same graphs, the same tokens. (Not by scores: rounding moves them, and a row that sets a threshold ties.)"""
    frozen = make_frozen("florence2_one_way", tmp_path / "bundle", "int8")
    tensors = zoo.inputs(frozen.name, ROWS)
    first = {stream: ExitRule.static(layers[0]) for stream, layers in zoo.exit_layers(frozen.name).items()}
    for rules in ({}, first):
        assert_same(*both(frozen, ExitPolicy(rules, precision="int8"), tensors, STEPS))
    size = (frozen.folder / "weights.safetensors").stat().st_size
    # Weights of tiny layers are few; all of them but embeddings, head and what lies outside the layers have 8 bits.
    assert size < 0.75 * sum(p.numel() * 4 for p in frozen.model.parameters())
    monkeypatch.setattr(files, "largest_weight", lambda *_: 63)
    with pytest.raises(ValueError, match="go up to 127, and this machine adds their products exactly up to 63"):
        PortableEngine(frozen.folder)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"min_p": 0.1}, r"does not do \['min_p'\]"),
        ({"pixel_values": np.zeros((2, 3, 32, 32), np.float32)}, r"must be \[B, 3, 64, 64\], the size that was frozen"),
        ({"input_ids": lambda n: [7] * 11}, r"must hold {n} image tokens, and text; got \[0, 0\] of 11"),
        ({"input_ids": lambda n: [4] * n}, r"must hold {n} image tokens, and text; got \[{n}, {n}\] of {n}"),
        ({"input_ids": lambda n: [4] * n + [7] * (65 - n)}, "has 65 tokens, .* the encoder takes 64"),
        ({"decoder_prompt": np.full((2, 60), 7)}, "must not pass the decoder's 64 positions"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be at least 1"),
    ],
)
def test_wrong_inputs(frozen, wrong, message):
    if "input_ids" in wrong and not zoo.reads_prompts(frozen.name):
        pytest.skip("it reads no prompt beside the picture")
    if "image tokens, and" in message and not zoo.image_tokens(frozen.name):
        pytest.skip("its prompts hold no picture")
    endless = reference.is_t5(frozen.model) or (frozen.name == "t5gemma2" and "encoder" in message)
    if "64" in message and "3, 64, 64" not in message and endless:
        pytest.skip("a T5's positions have no end, nor a T5Gemma 2's encoder's")
    given, n = (
        {k: tensor.numpy() for k, tensor in zoo.inputs(frozen.name, 2).items()} | wrong,
        zoo.image_tokens(frozen.name),
    )
    if "input_ids" in wrong:
        given["input_ids"] = np.array([wrong["input_ids"](n)] * 2)
        given["attention_mask"] = np.ones_like(given["input_ids"])
    with pytest.raises(ValueError, match=message.replace("{n}", str(n))):
        frozen.engine.generate(**given)


def test_weights_lie_there_once(frozen):
    """Little more than the model's own: heads, embeddings and tied layers are shared, and graphs hold none."""
    own = {tensor.data_ptr(): tensor.numel() * 4 for tensor in frozen.model.state_dict().values()}
    assert (frozen.folder / "weights.safetensors").stat().st_size < 1.05 * sum(own.values()) + 20_000
    assert attached(frozen.model) is not None
