"""Traces that are wrong: said so, or nothing is promised."""

from dataclasses import replace

import numpy as np
import pytest

from lightning_mue.calibration import propose
from lightning_mue.promise import Promise
from lightning_mue.trace import Trace


def with_scores(trace, change):
    """Return the trace with full depth's accuracy changed."""
    return replace(trace, full_score={"accuracy": change(trace.full_score["accuracy"].copy())})


def test_scores_that_are_no_numbers(make_trace, latency):
    def spoil(scores):
        scores[7] = np.nan
        return scores

    with pytest.raises(ValueError, match=r"'accuracy' must lie in \[0, 1\], got \[nan, nan\]"):
        propose(with_scores(make_trace(50), spoil), latency, [Promise("accuracy", keep=0.98)])


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_scores_that_are_all_equal(make_trace, latency, score):
    """A model that is always right or never: exits that change nothing are proposed, and nothing divides by 0."""
    trace = with_scores(make_trace(200), lambda scores: np.full_like(scores, score))
    streams = {
        name: replace(s, score_at={m: np.full_like(v, score) for m, v in s.score_at.items()})
        for name, s in trace.streams.items()
    }
    found = propose(replace(trace, streams=streams), latency, [Promise("accuracy", keep=0.98)])
    assert all(np.isfinite(c.used) and c.score["accuracy"] == score for c in found.frontier)


def test_traces_of_two_models(make_trace):
    ours = make_trace(10)
    other = replace(ours, sample_ids=[f"other{i}" for i in range(10)], meta={"fingerprint": "def"})
    with pytest.raises(ValueError, match="different models, exits or settings cannot be merged"):
        Trace.merge([ours, other])
