"""Dials: one number for a stream's whole rule, so that no search runs over many thresholds (calibration notes, 5)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lightning_mue.policy import SIGNAL_RANGES, ExitRule
from lightning_mue.trace import StreamTrace, Trace

GRID = 2.0**-20
"""Thresholds are multiples of this: exact in float32, and blind to the last bits in which two runs differ."""


def dial_rule(
    trace: Trace, name: str, signal: str, gamma: float, layers: Sequence[int] | None = None
) -> ExitRule | None:
    """Return the rule that leaves at each exit as often as harm allows; None if it could never leave.

    From the first exit on: the smallest observed score such that, among those that have not left before and score at
    least that, the estimated rate of harm is at most ``gamma``. Harm is a token that differs from full depth (decoder)
    or an output that does (other streams). The estimate is ``(harmed + 1/2) / (left + 1)``: few observations allow
    little.

    Args:
        trace: the full-depth pass.
        name: of the stream.
        signal: one of those the trace holds for it.
        gamma: the rate of harm allowed among those leaving, in (0, 1).
        layers: the exits that may ask; all if not given.
    """
    stream = trace.streams[name]
    scores, harm = _rows(trace, stream, signal)
    left_in = np.ones(len(scores), dtype=bool)
    asked, thresholds = [], []
    for column, layer in enumerate(stream.layers):
        if layers is not None and layer not in layers:
            continue
        threshold = _smallest_threshold(scores[left_in, column], harm[left_in, column], gamma)
        if threshold == math.inf:
            continue
        threshold = min(max(math.floor(threshold / GRID) * GRID, SIGNAL_RANGES[signal][0]), SIGNAL_RANGES[signal][1])
        asked.append(layer)
        thresholds.append(threshold)
        left_in &= scores[:, column] < np.asarray(threshold, dtype=scores.dtype)
    return ExitRule(signal, tuple(asked), tuple(thresholds)) if asked else None


def stream_options(trace: Trace, name: str, gammas: np.ndarray) -> list[ExitRule | None]:
    """Return the rules worth simulating for a stream: full depth, every static depth, every signal at every dial.

    A signal is asked at every exit, or at one alone: where asking costs much beside a layer, one exit is often better.
    """
    stream = trace.streams[name]
    rules: list[ExitRule | None] = [None, *(ExitRule.static(layer) for layer in stream.layers)]
    asked = dict.fromkeys([tuple(stream.layers), *((layer,) for layer in stream.layers)])
    for signal in sorted(stream.scores):
        rules += [dial_rule(trace, name, signal, float(gamma), layers) for layers in asked for gamma in gammas]
    return list(dict.fromkeys(rules))  # without repeats, in order


def _rows(trace: Trace, stream: StreamTrace, signal: str) -> tuple[np.ndarray, np.ndarray]:
    """Return scores and harm, ``[rows, E]``: a row is a sample, or a token the decoder really made."""
    if stream.agree is None:
        return stream.scores[signal], ~stream.same_at
    taken = np.arange(stream.agree.shape[1]) < trace.lengths[:, None]
    return stream.scores[signal][taken], ~stream.agree[taken]


def _smallest_threshold(scores: np.ndarray, harm: np.ndarray, gamma: float) -> float:
    if not len(scores):
        return math.inf
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    left = np.arange(1, len(ranked) + 1)
    allowed = (np.cumsum(harm[order]) + 0.5) / (left + 1) <= gamma
    allowed &= np.append(ranked[1:] < ranked[:-1], True)  # equal scores leave together
    return float(ranked[np.flatnonzero(allowed)[-1]]) if allowed.any() else math.inf
