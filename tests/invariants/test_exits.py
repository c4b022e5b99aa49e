"""Invariants 3, 4 and 5: forced exits are static models, just-in-time K/V is exact, rows are independent."""

import itertools
import math

import pytest
import torch

from lightning_mue.backbones import num_layers, view
from lightning_mue.policy import KV_FILLS, OF_EMBEDDINGS, SIGNAL_RANGES, ExitPolicy, ExitRule
from lightning_mue.signals import NEEDS_LOGITS
from tests import reference, zoo
from tests.invariants.policies import STEPS, assert_same_row, decoder_rule, executor_class, generate, mixed

BACKBONES = list(zoo.BACKBONES)
STREAMS = [(name, stream) for name in BACKBONES for stream in zoo.exit_layers(name)]
SIGNALS = [signal for signal in SIGNAL_RANGES if signal not in ("static", *OF_EMBEDDINGS)]


@pytest.mark.parametrize(("name", "stream"), STREAMS)
def test_thresholds_out_of_reach_are_full_depth(name, stream):
    model, tensors = zoo.shared(name), zoo.inputs(name, 3)
    layers = zoo.exit_layers(name)[stream]
    never = [math.inf] * len(layers)
    full, _ = generate(model, ExitPolicy.full_depth(), tensors)
    if stream == "decoder":
        policies = [ExitPolicy({stream: ExitRule(signal, layers, never, (0.9, 4.0))}) for signal in SIGNALS]
        policies.append(ExitPolicy({stream: ExitRule("patience", layers, [len(layers) + 1.0] * len(layers))}))
        policies.append(ExitPolicy({stream: ExitRule("confidence", layers, [0.0] * len(layers), from_step=STEPS)}))
        rule = ExitRule("gate", layers, never)
        policies += [
            ExitPolicy({stream: rule}, fill, backlog) for fill in ("propagate", "copy") for backlog in (0, 2, 50)
        ]
    else:
        signals = [signal for signal in SIGNALS if signal not in NEEDS_LOGITS]
        policies = [ExitPolicy({stream: ExitRule(signal, layers, never)}) for signal in signals]
    for policy in policies:
        found, _ = generate(model, policy, tensors, closed=False)
        assert found.sequences.tolist() == full.sequences.tolist()
        assert (found.pairs, found.filled) == (full.pairs, 0)
        depth = found.exit_depths[stream]
        assert set(depth[depth > 0].flatten().tolist()) == {num_layers(view(model))[stream]}


@pytest.mark.parametrize(("name", "stream"), STREAMS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_forced_exit_is_the_static_model(name, stream, seed):
    model, tensors = zoo.shared(name, seed), zoo.inputs(name, 3, seed)
    full, _ = generate(model, ExitPolicy.full_depth(), tensors)
    different = False
    for depth in zoo.exit_layers(name)[stream]:
        expected = reference.truncated_generate(model, tensors, stream, depth, max_new_tokens=STEPS)
        for fill in KV_FILLS if stream == "decoder" else KV_FILLS[:1]:
            found, _ = generate(model, ExitPolicy({stream: ExitRule.static(depth)}, fill), tensors)
            assert found.sequences.tolist() == expected.tolist(), depth
            assert found.filled == 0
        different |= full.sequences.tolist() != expected.tolist()
    assert different, "the test model does not depend on depth"


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("signal", [signal for signal in SIGNALS if signal != "flat_similarity"])
def test_just_in_time_states_are_those_of_a_full_pass(name, signal, monkeypatch):
    model, tensors = zoo.shared(name), zoo.inputs(name, 4)
    rule = decoder_rule(model, name, tensors, signal)
    seen: dict[tuple[int, int, int], int] = {}
    run_layer = executor_class().run_layer

    def counting(self, layer, pending):
        for first, last, rows in pending:
            for row, position in itertools.product(rows, range(first, last)):
                seen[layer, row, position] = seen.get((layer, row, position), 0) + 1
        run_layer(self, layer, pending)

    monkeypatch.setattr(executor_class(), "run_layer", counting)
    out, executor = generate(model, ExitPolicy({"decoder": rule}), tensors)
    assert set(seen.values()) == {1}, "a (position, layer) was computed twice"
    assert (out.pairs, out.filled) == (len(seen), 0)
    depths = out.exit_depths["decoder"]
    at_least = 2 if signal == "patience" else 3  # patience cannot leave at the first exit
    assert len(set(depths[depths > 0].tolist())) >= at_least, "the test policy does not mix depths"
    # The reference: the backbone's own forward over the same tokens, all layers.
    expected, _ = reference.decoder_states(model, tensors, out.sequences[:, :-1])
    for layer, row, position in seen:
        state = torch.as_tensor(executor.states[layer, row, position])
        if layer == executor.num_layers:
            state = reference.final_norm(model)(state)
        torch.testing.assert_close(state, expected[layer][row, position], rtol=1e-4, atol=1e-4)


POLICIES = {
    "just-in-time": {},
    "propagate": {"kv_fill": "propagate", "backlog": 1, "share": 0.5},
    "copy": {"kv_fill": "copy"},
    "similarity": {"signal": "similarity"},
    "patience": {"signal": "patience"},
    "decay": {"signal": "confidence", "decay": (0.8, 3.0), "from_step": 2},
}


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize(("policy", "seed"), [*((p, 0) for p in POLICIES), ("just-in-time", 1), ("just-in-time", 2)])
def test_a_batch_is_its_rows_one_by_one(name, policy, seed):
    model, tensors = zoo.shared(name, seed), zoo.inputs(name, 5, seed)
    policy = mixed(model, name, tensors, **POLICIES[policy])
    together, _ = generate(model, policy, tensors)
    pairs = filled = 0
    for depth in together.exit_depths.values():
        assert len(set(depth[depth > 0].flatten().tolist())) > 1, "the test policy does not mix depths"
    for row in range(5):
        single, _ = generate(model, policy, zoo.alone(tensors, row))
        pairs, filled = pairs + single.pairs, filled + single.filled
        assert_same_row(together, row, single)
    assert (together.pairs, together.filled) == (pairs, filled)
    assert (filled > 0) == (policy.kv_fill != "just-in-time")


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("policy", POLICIES)
def test_known_depths_replay_a_policy(name, policy):
    model, tensors = zoo.shared(name), zoo.inputs(name, 5)
    policy = mixed(model, name, tensors, **POLICIES[policy])
    first, _ = generate(model, policy, tensors)
    again, _ = generate(model, policy, tensors, forced=first.exit_depths["decoder"].tolist())
    assert again.sequences.tolist() == first.sequences.tolist()
    assert {k: v.tolist() for k, v in again.exit_depths.items()} == {
        k: v.tolist() for k, v in first.exit_depths.items()
    }
    assert (again.pairs, again.filled, again.layer_runs) == (first.pairs, first.filled, first.layer_runs)
