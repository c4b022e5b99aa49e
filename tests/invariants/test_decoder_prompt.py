"""Decoder prompts: invariants 2 to 5, 7 and 8 where each row is given tokens of its own before it answers."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from lightning_mue.backbones import view
from lightning_mue.calibration.simulate import simulate
from lightning_mue.inference.compare import transformers_variant
from lightning_mue.inference.record import record
from lightning_mue.latency import DecoderLatency
from lightning_mue.policy import KV_FILLS, ExitPolicy, ExitRule
from tests import reference, zoo
from tests.invariants.policies import (
    STEPS,
    assert_same_row,
    encoder_rules,
    engine_of,
    executor_class,
    generate,
    random_depths,
)
from tests.invariants.test_simulator import LATENCY

BACKBONES = list(zoo.BACKBONES)
LENGTHS = (4, 1, 7, 0)
ROWS = len(LENGTHS)
NOTHING = DecoderLatency((1, 4), (0.0, 0.0), 0.0, 0.0)


def prompted(name, seed=0):
    """Inputs whose rows have prompts of several lengths, one of them none."""
    g = torch.Generator().manual_seed(seed)
    prompt_BP = torch.randint(5, zoo.VOCABULARY, (ROWS, max(LENGTHS)), generator=g)
    prompt_BP.masked_fill_(torch.arange(max(LENGTHS)) >= torch.tensor(LENGTHS)[:, None], -100)
    return zoo.inputs(name, ROWS, seed) | {"decoder_prompt": prompt_BP}


def alone(tensors, row):
    """One row without any padding, and what it is given, start token first."""
    one = zoo.alone(tensors, row)
    one["decoder_prompt"] = one["decoder_prompt"][:, : LENGTHS[row]]
    given = torch.cat([torch.full((1, 1), zoo.START), one["decoder_prompt"]], 1)
    return one, given


def reference_ids(model, tensors, row, **settings):
    """What transformers' ``generate`` answers to one row, without the prompt and with the start token."""
    one, given = alone(tensors, row)
    del one["decoder_prompt"]
    ids = reference.generate(model, one, decoder_input_ids=given, max_new_tokens=STEPS, **settings)
    return [zoo.START, *ids[0, given.shape[1] :].tolist()]


def gate_policy(model, name, tensors, **fill):
    """Every stream is left at many layers."""
    layers = zoo.exit_layers(name)["decoder"]
    trace = recorded(name)
    taken = np.arange(trace.streams["decoder"].agree.shape[1]) < trace.lengths[:, None]
    scores = trace.streams["decoder"].scores["gate"][taken]
    rule = ExitRule("gate", layers, (np.quantile(scores, 0.6, axis=0) - 1e-5).tolist())
    return ExitPolicy(encoder_rules(model, name, tensors) | {"decoder": rule}, **fill)


@cache
def recorded(name):
    ids = [f"s{i}" for i in range(ROWS)]
    return record(zoo.shared(name), prompted(name), ids, ids, lambda s: {"accuracy": [0.5] * len(s)}, STEPS)


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("seed", [0, 1])
def test_full_depth_equals_generate(name, seed):
    model, tensors = zoo.shared(name, seed), prompted(name, seed)
    out, _ = generate(model, ExitPolicy.full_depth(), tensors)
    plain = transformers_variant(model, STEPS)(tensors)
    different = False
    without, _ = generate(model, ExitPolicy.full_depth(), {k: v for k, v in tensors.items() if k != "decoder_prompt"})
    for row in range(ROWS):
        expected = reference_ids(model, tensors, row)
        assert out.sequences[row, : len(expected)].tolist() == expected
        assert plain[row, : len(expected)].tolist() == expected
        different |= without.sequences[row, : len(expected)].tolist() != expected
    # Random post-norm models repeat one token whatever they read: their states are compared below.
    assert different or isinstance(reference.final_norm(model), torch.nn.Identity), "the prompts change nothing"


@pytest.mark.parametrize(
    "setting", [{"forced_eos_token_id": 7}, {"forced_bos_token_id": 9}, {"no_repeat_ngram_size": 1}]
)
def test_generation_config_is_obeyed(setting):
    name = "florence2"
    model, tensors = zoo.make(name), prompted(name)
    before, _ = generate(model, ExitPolicy.full_depth(), tensors)
    for key, value in setting.items():
        setattr(model.generation_config, key, value)
    out, _ = generate(model, ExitPolicy.full_depth(), tensors)
    assert out.sequences.tolist() != before.sequences.tolist()
    for row in range(ROWS):
        expected = reference_ids(model, tensors, row)
        assert out.sequences[row, : len(expected)].tolist() == expected


@pytest.mark.parametrize("name", BACKBONES)
def test_a_constraint_sees_the_answer_alone(name):
    model, tensors = zoo.shared(name), prompted(name)
    shown = []

    def allowed(row, ids):
        shown.append((row, ids.tolist()))
        return [11, 12, 13] if len(ids) < 3 else [zoo.END]

    found = engine_of(model, ExitPolicy.full_depth()).generate(STEPS, allowed, **tensors).sequences
    ours, shown[:] = list(shown), []
    plain = transformers_variant(model, STEPS, allowed)(tensors)
    assert found.tolist() == plain.tolist()
    assert set(found[:, 1:3].flatten().tolist()) <= {11, 12, 13}
    assert sorted(map(str, ours)) == sorted(map(str, shown))
    assert {row for row, _ in ours} == set(range(ROWS))
    assert all(ids == found[row, : len(ids)].tolist() for row, ids in ours)


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("fill", KV_FILLS)
def test_a_forced_exit_is_the_static_model(name, fill):
    model, tensors = zoo.shared(name), prompted(name)
    for depth in zoo.exit_layers(name)["decoder"]:
        out, _ = generate(model, ExitPolicy({"decoder": ExitRule.static(depth)}, fill), tensors)
        assert out.filled == 0
        for row in range(ROWS):
            with reference.left_after(model, "decoder", depth):
                expected = reference_ids(model, tensors, row)
            assert out.sequences[row, : len(expected)].tolist() == expected


@pytest.mark.parametrize("name", BACKBONES)
def test_states_are_those_of_a_full_pass_and_computed_once(name):
    model, tensors = zoo.shared(name), prompted(name)
    policy = ExitPolicy({"decoder": gate_policy(model, name, tensors).rules["decoder"]})
    out, executor = generate(model, policy, tensors)
    depths = out.exit_depths["decoder"]
    assert len(set(depths[depths > 0].tolist())) > 2
    pairs = 0
    for row in range(ROWS):
        one, given = alone(tensors, row)
        del one["decoder_prompt"]
        steps = int((depths[row] > 0).sum())
        ids = torch.cat([given, out.sequences[row : row + 1, 1:steps]], 1)
        expected, _ = reference.decoder_states(model, one, ids)
        for layer in range(1, executor.num_layers + 1):
            last = [LENGTHS[row] + t + 1 for t in range(steps) if depths[row, t] >= layer]
            seen = max(last, default=0)  # every position up to the last token that came so deep
            pairs += seen
            state = torch.as_tensor(executor.states[layer, row, :seen])
            if layer == executor.num_layers:
                state = reference.final_norm(model)(state)
            torch.testing.assert_close(state, expected[layer][0, :seen], rtol=1e-4, atol=1e-4)
    assert (out.pairs, out.filled) == (pairs, 0)


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("fill", [{}, {"kv_fill": "propagate", "backlog": 1}, {"kv_fill": "copy"}])
def test_a_batch_is_its_rows_one_by_one(name, fill):
    model, tensors = zoo.shared(name), prompted(name)
    policy = gate_policy(model, name, tensors, **fill)
    together, _ = generate(model, policy, tensors)
    pairs = filled = 0
    for row in range(ROWS):
        single, _ = generate(model, policy, alone(tensors, row)[0])
        pairs, filled = pairs + single.pairs, filled + single.filled
        assert_same_row(together, row, single)
    assert (together.pairs, together.filled) == (pairs, filled)
    assert (filled > 0) == bool(fill)
    again, _ = generate(model, policy, tensors, forced=together.exit_depths["decoder"].tolist())
    assert again.sequences.tolist() == together.sequences.tolist()
    assert (again.pairs, again.filled, again.layer_runs) == (together.pairs, together.filled, together.layer_runs)


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("fill", KV_FILLS[1:])
def test_a_prompt_is_computed_under_every_fill(name, fill):
    model, tensors = zoo.shared(name), prompted(name)
    depths = random_depths(name, ROWS)
    exact, _ = generate(model, ExitPolicy(), tensors, depths)
    found, executor = generate(model, ExitPolicy(kv_fill=fill), tensors, depths)
    for row in range(ROWS):
        one, given = alone(tensors, row)
        del one["decoder_prompt"]
        expected, _ = reference.decoder_states(model, one, given)
        deepest = int(found.exit_depths["decoder"][row].max())
        for layer in range(1, deepest + 1):
            state = torch.as_tensor(executor.states[layer, row, : LENGTHS[row]])
            if layer == executor.num_layers:
                state = reference.final_norm(model)(state)
            torch.testing.assert_close(state, expected[layer][0, : LENGTHS[row]], rtol=1e-4, atol=1e-4)
    assert found.filled > 0
    same, _ = generate(model, ExitPolicy(kv_fill=fill, backlog=STEPS), tensors, depths)
    assert same.sequences.tolist() == exact.sequences.tolist()
    assert (same.pairs, same.filled) == (exact.pairs, 0)


@pytest.mark.parametrize("name", BACKBONES)
def test_the_simulator_says_what_the_engine_does(name):
    model, tensors = zoo.shared(name), prompted(name)
    trace = recorded(name)
    assert trace.prompts.tolist() == list(LENGTHS)
    policy = ExitPolicy({"decoder": gate_policy(model, name, tensors).rules["decoder"]})
    found, full = simulate(trace, policy, LATENCY), generate(model, ExitPolicy.full_depth(), tensors)[0].sequences
    assert simulate(trace, ExitPolicy.full_depth(), LATENCY).pairs.tolist() == [
        view(model).decoder.num_layers * (LENGTHS[row] + int(trace.lengths[row])) for row in range(ROWS)
    ]
    for row in range(ROWS):
        single, _ = generate(model, policy, alone(tensors, row)[0])
        length = int(trace.lengths[row])
        mine = single.sequences[0, 1 : length + 1].tolist()
        theirs = full[row, 1 : length + 1].tolist()
        until = next((t + 1 for t, pair in enumerate(zip(mine, theirs, strict=False)) if pair[0] != pair[1]), length)
        assert found.depths["decoder"][row, :until].tolist() == single.exit_depths["decoder"][0, :until].tolist()
        if found.same[row]:
            assert found.pairs[row] == single.pairs


@pytest.mark.parametrize("name", BACKBONES)
def test_steps_are_counted_from_the_first_answer_token(name):
    model, tensors = zoo.shared(name), prompted(name)
    layers = zoo.exit_layers(name)["decoder"]
    rule = ExitRule("confidence", layers, [0.0] * len(layers), from_step=2)
    out, executor = generate(model, ExitPolicy({"decoder": rule}), tensors)
    for depths in out.exit_depths["decoder"]:
        taken = depths[depths > 0].tolist()
        assert taken == [executor.num_layers] * min(2, len(taken)) + [layers[0]] * max(0, len(taken) - 2)


@pytest.mark.parametrize("name", BACKBONES)
def test_simulated_time_is_that_of_the_blocks_that_run(name, monkeypatch):
    model, tensors = zoo.shared(name), prompted(name)
    policy = ExitPolicy({"decoder": gate_policy(model, name, tensors).rules["decoder"]})
    cost = DecoderLatency((1, 4), (1.0, 2.0), 0.3, 0.0, {"gate": 0.0})
    found = simulate(recorded(name), policy, replace(LATENCY, decoder=cost))
    others = simulate(recorded(name), ExitPolicy.full_depth(), replace(LATENCY, decoder=NOTHING)).ms
    blocks, run_layer = [], executor_class().run_layer

    def noting(self, layer, pending):
        blocks.extend((layer, last - first) for first, last, _ in pending)
        run_layer(self, layer, pending)

    monkeypatch.setattr(executor_class(), "run_layer", noting)
    seen = 0
    for row in range(ROWS):
        blocks.clear()
        depths = found.depths["decoder"][row]
        out, _ = generate(model, ExitPolicy.full_depth(), alone(tensors, row)[0], forced=[depths.tolist()])
        if out.exit_depths["decoder"][0].tolist() == depths[depths > 0].tolist():  # other tokens may end elsewhere
            seen += 1
            of_layers = sum(float(cost.layer_cost(np.array(m))) for _, m in blocks) + 0.3 * len({k for k, _ in blocks})
            assert found.ms[row] == pytest.approx(others[row] + of_layers)
    assert seen


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (torch.tensor([[5, 6]]), r"must be \[4, tokens\], got \[1, 2\]"),
        (torch.tensor([[-100, 6]] * 4), "padded with -100 on the right alone"),
        (torch.full((4, 60), 7), "must not pass the decoder's 64 positions, got 72"),
    ],
)
def test_bad_prompts_are_refused(prompt, message):
    tensors = zoo.inputs("florence2", 4) | {"decoder_prompt": prompt}
    with pytest.raises(ValueError, match=message):
        generate(zoo.shared("florence2"), ExitPolicy.full_depth(), tensors)


def test_the_name_that_transformers_gives_prompts_is_not_passed_over():
    tensors = zoo.inputs("florence2", 2) | {"decoder_input_ids": torch.tensor([[zoo.START, 7]] * 2)}
    with pytest.raises(ValueError, match="takes `decoder_prompt"):
        generate(zoo.shared("florence2"), ExitPolicy.full_depth(), tensors)
