import numpy as np
import pytest

from lightning_mue import CollectTrace, Trace
from lightning_mue.callbacks import collect_trace
from lightning_mue.inference.record import record

from .conftest import BATCH, SAMPLES, TOKENS


def nothing(sequences):
    return {}


def assert_equal(found, expected):
    assert found.sample_ids == expected.sample_ids
    assert found.clusters == expected.clusters
    np.testing.assert_array_equal(found.lengths, expected.lengths)
    assert found.full_score == expected.full_score == {}
    assert found.streams.keys() == expected.streams.keys()
    for name, stream in expected.streams.items():
        mine = found.streams[name]
        assert (mine.layers, mine.num_layers) == (stream.layers, stream.num_layers)
        assert mine.scores.keys() == stream.scores.keys()
        for signal, scores in stream.scores.items():
            np.testing.assert_array_equal(mine.scores[signal], scores)
        np.testing.assert_array_equal(mine.same_at, stream.same_at)
        if stream.agree is not None:
            np.testing.assert_array_equal(mine.agree, stream.agree)


def test_is_what_record_gives_on_the_same_batches(module, make_loader, make_trainer, tmp_path):
    collect = CollectTrace(str(tmp_path / "trace.safetensors"), "consistency", max_new_tokens=TOKENS)
    make_trainer(collect).validate(module, make_loader(), verbose=False)
    meta = collect.trace.meta
    parts = [
        record(module.model, batch, batch["sample_id"], batch["cluster"], nothing, TOKENS, None, meta)
        for batch in make_loader()
    ]
    assert len(collect.trace) == SAMPLES
    assert_equal(collect.trace, Trace.merge(parts))
    assert_equal(Trace.load(tmp_path / "trace.safetensors"), collect.trace)


def test_splits_are_disjoint_and_complete(module, make_loader, make_trainer):
    found = {}
    for split in ("propose", "certify"):
        collect = CollectTrace(metric="consistency", split=split, max_new_tokens=2)
        make_trainer(collect).validate(module, make_loader(), verbose=False)
        found[split] = set(collect.trace.sample_ids)
    assert not found["propose"] & found["certify"]
    assert len(found["propose"] | found["certify"]) == SAMPLES


def test_other_data_of_the_same_names_is_recorded_anew(module, make_loader, make_trainer, monkeypatch):
    calls = []
    monkeypatch.setattr(collect_trace, "record", lambda *args: calls.append(1) or record(*args))

    def collected(seed):
        collect = CollectTrace(metric="consistency", max_new_tokens=2)
        make_trainer(collect).validate(module, make_loader(2 * BATCH, seed), verbose=False)
        return collect.trace

    first = collected(0)
    assert len(calls) == 2
    collected(0)
    assert len(calls) == 2  # all in the journal
    assert not np.array_equal(collected(1).streams["vision"].scores["gate"], first.streams["vision"].scores["gate"])
    assert len(calls) == 4


def test_sanity_check_leaves_nothing(module, make_loader, make_trainer, tmp_path):
    collect = CollectTrace(metric="consistency", max_new_tokens=2)
    trainer = make_trainer(collect, num_sanity_val_steps=1, limit_val_batches=1, max_steps=1)
    trainer.fit(module, make_loader(BATCH), make_loader(BATCH))
    assert len(collect.trace) == BATCH
    assert len(list((tmp_path / "run" / "calibration").iterdir())) == 1


def test_a_metric_that_needs_references_says_so(module, make_loader, make_trainer):
    with pytest.raises(ValueError, match=r"'exact_match' needs a data module with a `processor`.*'consistency'"):
        make_trainer(CollectTrace(max_new_tokens=2)).validate(module, make_loader(), verbose=False)
