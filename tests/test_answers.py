"""Answers: every figure once more by hand, from the engine's own output for each sample alone."""

from types import SimpleNamespace

import numpy as np
import pytest

from lightning_mue.answers import answer, plain_answers
from lightning_mue.backbones import num_layers, view
from lightning_mue.callbacks.batches import single
from lightning_mue.inference import ExitEngine
from lightning_mue.inference.compare import engine_variant
from lightning_mue.policy import ExitPolicy, ExitRule
from tests.zoo import END, PAD, exit_layers, inputs, shared

DATA = SimpleNamespace(
    processor=SimpleNamespace(
        decode=lambda ids: [" ".join(str(int(t)) for t in row if t not in (END, PAD)) for row in ids]
    ),
    answer_constraint=lambda end_id: None,
)


def length(text, references):
    return len(text) / 50


def batches(name):
    for seed in range(2):
        names = [f"{seed}-{row}" for row in range(3)]
        yield inputs(name, 3, seed) | {"sample_id": names, "cluster": names, "references": [["x"]] * 3}


def uneven(name, fill="just-in-time"):
    rules = {
        stream: ExitRule("similarity" if stream != "decoder" else "margin", ks, (0.2,) * len(ks))
        for stream, ks in exit_layers(name).items()
    }
    return ExitPolicy(rules, fill)


@pytest.mark.parametrize("fill", ["just-in-time", "copy"])
@pytest.mark.parametrize("name", ["florence2", "florence2_decomposed"])
def test_figures_are_those_of_each_sample_alone(name, fill):
    model, told = shared(name), []
    policy, layers = uneven(name, fill), num_layers(view(model))
    found = answer(model, policy, batches(name), DATA, length, done=told.append)
    engine = ExitEngine(model, policy)
    alone = [engine.generate(**single(batch, row)) for batch in batches(name) for row in range(3)]
    depths = [o.exit_depths["decoder"][0] for o in alone]
    assert [row for rows in found.by_row for row in rows] == [d[d > 0].tolist() for d in depths]
    assert found.texts == [DATA.processor.decode(o.sequences[:, 1:])[0] for o in alone]
    assert found.quality == pytest.approx(np.mean([len(t) / 50 for t in found.texts]))
    tokens = sum(int((d > 0).sum()) for d in depths)
    assert len({int(d) for row in depths for d in row}) > 2
    assert found.computed == pytest.approx(sum(o.pairs for o in alone) / tokens)
    assert found.filled == pytest.approx(sum(o.filled for o in alone) / tokens)
    assert (found.filled > 0) == (fill == "copy")
    encoders = [s for s in layers if s not in ("vision", "decoder")]
    run = sum(
        float(d.sum()) + int((d > 0).sum()) * np.mean([int(o.exit_depths[s]) for s in encoders])
        for o, d in zip(alone, depths, strict=True)
    )
    assert found.layers_saved == pytest.approx(1 - run / tokens / (layers[encoders[0]] + layers["decoder"]))
    for row, depth in zip(found.decoder_BT, depths, strict=True):
        assert row[: len(depth)].tolist() == depth.tolist()
        assert not row[len(depth) :].any()
    assert told == [3, 3]
    assert found.same(answer(model, ExitPolicy.full_depth(), batches(name), DATA, length)) < 1


def test_depths_are_replayed():
    model, policy = shared("florence2"), uneven("florence2")
    first = answer(model, policy, batches("florence2"), DATA, length)
    streams = ExitPolicy({s: r for s, r in policy.rules.items() if s != "decoder"})
    again = answer(model, streams, batches("florence2"), DATA, length, first.by_row)
    assert (again.texts, again.by_row) == (first.texts, first.by_row)
    scores, texts = plain_answers(engine_variant(ExitEngine(model, policy)), batches("florence2"), DATA, length)
    assert (scores.tolist(), texts) == (first.scores.tolist(), first.texts)
