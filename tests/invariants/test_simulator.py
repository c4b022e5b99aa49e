"""Invariant 7: while tokens agree, the simulator says exactly what the engine does."""

import numpy as np
import pytest
import torch

from lightning_mue.backbones import view
from lightning_mue.calibration.simulate import simulate
from lightning_mue.inference.record import record
from lightning_mue.latency import DecoderLatency, LatencyTable, StreamLatency
from lightning_mue.policy import ExitPolicy, ExitRule
from tests import zoo
from tests.invariants.policies import engine_of

SAMPLES = 16


def score_of(sequences):
    return {"accuracy": [float(len(set(row.tolist())) % 2) for row in sequences]}


SIGNAL_MS = {"gate": 0.1, "similarity": 0.1, "confidence": 0.4, "margin": 0.4, "entropy": 0.4}
LATENCY = LatencyTable(
    {name: StreamLatency(1.0, 0.5, SIGNAL_MS) for name in ("vision", "encoder", "image", "text")},
    DecoderLatency((1, 4), (1.0, 2.0), 0.3, 0.7, SIGNAL_MS),
)


@pytest.fixture(scope="module", params=list(zoo.BACKBONES))
def traced(request):
    model = zoo.shared(request.param, seed=1)
    tensors = zoo.inputs(request.param, SAMPLES)
    ids = [f"s{i:02d}" for i in range(SAMPLES)]
    meta = {"decode": view(model).decode_settings(None).plain}
    trace = record(model, tensors, ids, ids, score_of, meta=meta)
    full = engine_of(model, ExitPolicy.full_depth()).generate(**tensors).sequences
    return request.param, model, tensors, trace, full


@pytest.mark.parametrize("signal", list(SIGNAL_MS))
@pytest.mark.parametrize(
    ("share", "falling"), [(0.1, {}), (0.3, {}), (0.6, {}), (0.6, {"decay": (0.9, 4.0)}), (0.6, {"from_step": 2})]
)
def test_depths_and_pairs(traced, signal, share, falling):
    name, model, tensors, trace, full = traced
    layers = zoo.exit_layers(name)["decoder"]
    scores = trace.streams["decoder"].scores[signal]
    steps = np.arange(scores.shape[1])[None, :] < trace.lengths[:, None]
    thresholds = [float(np.quantile(scores[..., e][steps], 1 - share)) for e in range(len(layers))]
    policy = ExitPolicy({"decoder": ExitRule(signal, layers, thresholds, **falling)})
    out = engine_of(model, policy).generate(**tensors)
    found = simulate(trace, policy, LATENCY)
    agreeing = []
    for row in range(SAMPLES):
        length = int(trace.lengths[row])
        same = out.sequences[row, 1 : length + 1].tolist() == full[row, 1 : length + 1].tolist()
        assert bool(found.same[row]) == same
        # Depths are right up to and including the first token that differs.
        until = next((t + 1 for t in range(length) if out.sequences[row, t + 1] != full[row, t + 1]), length)
        assert found.depths["decoder"][row, :until].tolist() == out.exit_depths["decoder"][row, :until].tolist()
        if same:
            agreeing.append(row)
    for row in agreeing[:4]:
        alone = {k: v[row : row + 1] for k, v in tensors.items()}
        assert found.pairs[row] == engine_of(model, policy).generate(**alone).pairs
    assert share > 0.1 or agreeing


def test_encoder_depths(traced):
    name, model, tensors, trace, full = traced
    for stream in set(trace.streams) - {"decoder"}:
        layers = zoo.exit_layers(name)[stream]
        for signal in ("gate", "similarity"):
            scores = trace.streams[stream].scores[signal]
            rule = ExitRule(signal, layers, [float(np.median(scores[:, e])) for e in range(len(layers))])
            policy = ExitPolicy({stream: rule})
            out = engine_of(model, policy).generate(**tensors)
            found = simulate(trace, policy, LATENCY)
            assert found.depths[stream].tolist() == out.exit_depths[stream].tolist()
            width = max(full.shape[1], out.sequences.shape[1])
            pad = [torch.nn.functional.pad(s, (0, width - s.shape[1])) for s in (full, out.sequences)]
            assert found.same.tolist() == (pad[0] == pad[1]).all(1).tolist()


def test_another_batch_size_records_the_same(traced):
    """Invariant 9: scores agree to float noise whatever the batches were."""
    _, model, tensors, trace, _ = traced
    ids = [f"s{i:02d}" for i in range(SAMPLES)]
    parts = []
    for first, last in ((0, 5), (5, SAMPLES)):
        rows = {k: v[first:last] for k, v in tensors.items()}
        part_ids = ids[first:last]
        parts.append(record(model, rows, part_ids, part_ids, score_of))
    merged = type(trace).merge(parts[::-1])
    assert merged.sample_ids == trace.sample_ids
    assert merged.lengths.tolist() == trace.lengths.tolist()
    for stream, there in trace.streams.items():
        for signal, values in there.scores.items():
            here = merged.streams[stream].scores[signal]
            if stream == "decoder":
                steps = np.arange(values.shape[1])[None, :, None] < trace.lengths[:, None, None]
                values, here = values * steps, here[:, : values.shape[1]] * steps
            np.testing.assert_allclose(here, values, atol=2e-5)


def test_what_was_not_computed_is_not_in_the_trace(traced):
    _, model, tensors, *_ = traced
    ids = [f"s{i:02d}" for i in range(SAMPLES)]

    def allowed(row, tokens):
        return [20 + row] if len(tokens) < 2 + row % 5 else [zoo.END]  # rows end at different steps

    trace = record(model, tensors, ids, ids, lambda s: {}, prefix_fn=allowed)
    assert trace.lengths.tolist() == [2 + row % 5 for row in range(SAMPLES)]
    beyond = np.arange(trace.streams["decoder"].agree.shape[1])[None] >= trace.lengths[:, None]
    for values in (*trace.streams["decoder"].scores.values(), trace.streams["decoder"].agree):
        assert not values[beyond].any()


@pytest.mark.parametrize(
    ("rule", "fill", "message"),
    [
        (ExitRule.static(1), "propagate", "`kv_fill='propagate'` changes states and cannot be simulated; decode with"),
        (ExitRule.static(1), "copy", "`kv_fill='copy'` changes states and cannot be simulated"),
        (ExitRule("patience", (1,), (2.0,)), "just-in-time", "'decoder' cannot be simulated: signal 'patience'"),
        (ExitRule("flat_similarity", (1,), (0.5,)), "just-in-time", "simulated: signal 'flat_similarity' is no score"),
    ],
)
def test_what_a_trace_cannot_tell_is_refused(traced, rule, fill, message):
    *_, trace, _ = traced
    with pytest.raises(ValueError, match=message):
        simulate(trace, ExitPolicy({"decoder": rule}, fill), LATENCY)
