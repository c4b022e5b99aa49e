"""Invariants 3, 4 and 5: forced exits are static models, just-in-time K/V is exact, rows are independent."""

import math

import pytest
import torch

from lightning_mue.backbones import num_layers, view
from lightning_mue.exits import attached
from lightning_mue.inference import ExitEngine
from lightning_mue.inference.encode import encode, stream_scores
from lightning_mue.inference.stopwatch import Stopwatch
from lightning_mue.inference.torch_executor import TorchExecutor
from lightning_mue.policy import ExitPolicy, ExitRule
from tests import zoo

BACKBONES = list(zoo.BACKBONES)
STREAMS = [(name, stream) for name in BACKBONES for stream in zoo.exit_layers(name)]
STEPS = 12


def generate(model, policy, tensors):
    return ExitEngine(model, policy).run(STEPS, None, False, tensors)


def decoder_rule(model, name, tensors, signal, share=0.35):
    """A rule under which about ``share`` of the tokens leave at each exit: thresholds are quantiles at full depth."""
    out, executor = generate(model, ExitPolicy.full_depth(), tensors)
    layers = zoo.exit_layers(name)["decoder"]
    thresholds = []
    for k in layers:
        scores = []
        for position in range(out.sequences.shape[1] - 1):
            logits = executor.exit_logits(k, slice(None), position)
            scores.append(executor.scores(signal, k, slice(None), position, logits))
        thresholds.append(torch.stack(scores).flatten().quantile(1 - share).item())
    return ExitRule(signal, layers, thresholds)


def encoder_rules(model, name, tensors, share=0.35):
    """The same for the streams left once per sample, by gate."""
    scores: dict[str, dict[int, torch.Tensor]] = {}
    exits = attached(model)

    def record(stream, k, state, before):
        if k in exits.layers[stream]:
            scores.setdefault(stream, {})[k] = stream_scores(exits, "gate", stream, k, state, before)

    with torch.inference_mode():
        encode(view(model), exits, tensors, {}, Stopwatch(torch.device("cpu"), False), record)
    return {
        stream: ExitRule("gate", tuple(at), [s.quantile(1 - share).item() for s in at.values()])
        for stream, at in scores.items()
    }


def mixed(model, name, tensors):
    """A policy under which rows and tokens leave every stream at many different layers."""
    decoder = decoder_rule(model, name, tensors, "gate")
    return ExitPolicy(encoder_rules(model, name, tensors) | {"decoder": decoder})


@pytest.mark.parametrize(("name", "stream"), STREAMS)
def test_thresholds_out_of_reach_are_full_depth(name, stream):
    model = zoo.make(name)
    tensors = zoo.inputs(name, 3)
    layers = zoo.exit_layers(name)[stream]
    full, _ = generate(model, ExitPolicy.full_depth(), tensors)
    for signal in ("gate", "similarity", *(("confidence", "margin") if stream == "decoder" else ())):
        policy = ExitPolicy({stream: ExitRule(signal, layers, [math.inf] * len(layers))})
        found, _ = generate(model, policy, tensors)
        assert found.sequences.tolist() == full.sequences.tolist()
        depth = found.exit_depths[stream]
        assert set(depth[depth > 0].flatten().tolist()) == {num_layers(view(model))[stream]}


def truncated_generate(name, seed, stream, depth, tensors):
    """The backbone's own ``generate`` after its layers above ``depth`` were removed and the adapter put at the end."""
    model = zoo.make(name, seed)
    exits = attached(model)
    if stream == "decoder":
        layers = model.model.language_model.decoder.layers
    elif stream == "encoder":
        layers = model.model.language_model.encoder.layers
    else:
        tower = model.model.vision_tower
        layers = tower.blocks[2]

    def adapt(_module, _inputs, output):
        if stream == "vision":
            flat = exits.adapt(stream, depth, output.flatten(2).transpose(1, 2))
            return flat.transpose(1, 2).reshape(output.shape)
        return exits.adapt(stream, depth, output)

    layers[depth - 1].register_forward_hook(adapt)
    del layers[depth:]
    if stream == "decoder":
        model.config.text_config.decoder_layers = depth
    return model.generate(**tensors, num_beams=1, do_sample=False, max_new_tokens=STEPS)


@pytest.mark.parametrize(("name", "stream"), STREAMS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_forced_exit_is_the_static_model(name, stream, seed):
    tensors = zoo.inputs(name, 3, seed)
    different = False
    for depth in zoo.exit_layers(name)[stream]:
        expected = truncated_generate(name, seed, stream, depth, tensors)
        model = zoo.make(name, seed)
        found, _ = generate(model, ExitPolicy({stream: ExitRule.static(depth)}), tensors)
        assert found.sequences.tolist() == expected.tolist(), depth
        full, _ = generate(model, ExitPolicy.full_depth(), tensors)
        different |= full.sequences.tolist() != expected.tolist()
    assert different, "the test model does not depend on depth"


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("signal", ["gate", "similarity", "confidence", "margin"])
def test_just_in_time_states_are_those_of_a_full_pass(name, signal, monkeypatch):
    model = zoo.make(name)
    tensors = zoo.inputs(name, 4)
    rule = decoder_rule(model, name, tensors, signal)
    seen: dict[tuple[int, int, int], int] = {}
    run_layer = TorchExecutor.run_layer

    def counting(self, layer, rows, first, last):
        for row in rows:
            for position in range(first, last):
                seen[layer, row, position] = seen.get((layer, row, position), 0) + 1
        run_layer(self, layer, rows, first, last)

    monkeypatch.setattr(TorchExecutor, "run_layer", counting)
    out, executor = generate(model, ExitPolicy({"decoder": rule}), tensors)
    assert set(seen.values()) == {1}, "a (position, layer) was computed twice"
    assert out.pairs == len(seen)
    depths = out.exit_depths["decoder"]
    assert len(set(depths[depths > 0].tolist())) >= 3, "the test policy does not mix depths"
    # The reference: the backbone's own forward over the same tokens, all layers.
    ids = out.sequences[:, :-1]
    states = model(**tensors, decoder_input_ids=ids, output_hidden_states=True).decoder_hidden_states
    for layer, row, position in seen:
        torch.testing.assert_close(
            executor.states[layer, row, position], states[layer][row, position], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("name", BACKBONES)
def test_just_in_time_keys_are_those_of_full_depth(name):
    """When the policy's tokens equal the full-depth ones, so do keys and values wherever they were computed."""
    model = zoo.make(name)
    tensors = zoo.inputs(name, 3)
    policy = mixed(model, name, tensors)
    out, executor = generate(model, policy, tensors)
    encoders = {s: r for s, r in policy.rules.items() if s != "decoder"}
    _, deep = generate(model, ExitPolicy(encoders), tensors)
    for layer in range(1, executor.num_layers + 1):
        for row in range(3):
            same = (executor.ids[row] == deep.ids[row]).cumprod(0)[: out.sequences.shape[1] - 1].bool()
            reached = executor._keys[layer, row].abs().sum((0, 2))[: len(same)] > 0
            both = same & reached & (out.exit_depths["decoder"][row] >= layer)
            for mine, theirs in ((executor._keys, deep._keys), (executor._values, deep._values)):
                torch.testing.assert_close(
                    mine[layer, row, :, : len(same)][:, both],
                    theirs[layer, row, :, : len(same)][:, both],
                    rtol=1e-4,
                    atol=1e-4,
                )


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_batch_is_its_rows_one_by_one(name, seed):
    model = zoo.make(name, seed)
    tensors = zoo.inputs(name, 6, seed)
    policy = mixed(model, name, tensors)
    together, _ = generate(model, policy, tensors)
    assert len(set(together.exit_depths["encoder"].tolist())) > 1
    for row in range(6):
        keep = tensors["attention_mask"][row].bool()
        alone = {k: v[row : row + 1] for k, v in tensors.items()}
        alone |= {k: alone[k][:, keep] for k in ("input_ids", "attention_mask")}  # without its padding
        single, _ = generate(model, policy, alone)
        length = single.sequences.shape[1]
        assert together.sequences[row, :length].tolist() == single.sequences[0].tolist()
        for stream, depth in single.exit_depths.items():
            together_depth = together.exit_depths[stream][row]
            assert together_depth.tolist() == depth[0].tolist() or (
                together_depth[: length - 1].tolist() == depth[0].tolist()
            )
