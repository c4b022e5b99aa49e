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
    return _Ranked(trace, trace.streams[name], signal).rule(gamma, layers)


class _Ranked:
    """One signal's scores at every exit, sorted once for all rules; a row is a sample, or a token really made."""

    def __init__(self, trace: Trace, stream: StreamTrace, signal: str) -> None:
        self._signal, self._layers = signal, stream.layers
        if stream.agree is None:
            self._scores, self._harm = stream.scores[signal], ~stream.same_at
        else:
            taken = np.arange(stream.agree.shape[1]) < trace.lengths[:, None]
            self._scores, self._harm = stream.scores[signal][taken], ~stream.agree[taken]
        self._order = np.argsort(-self._scores, axis=0, kind="stable")

    def rule(self, gamma: float, layers: Sequence[int] | None) -> ExitRule | None:
        """Return what ``dial_rule`` says."""
        left_in = np.ones(len(self._scores), dtype=bool)
        asked, thresholds = [], []
        for column, layer in enumerate(self._layers):
            if layers is not None and layer not in layers:
                continue
            order = self._order[:, column]
            order = order[left_in[order]]
            threshold = _smallest_threshold(self._scores[order, column], self._harm[order, column], gamma)
            if threshold == math.inf:
                continue
            low, high = SIGNAL_RANGES[self._signal]
            threshold = min(max(math.floor(threshold / GRID) * GRID, low), high)
            asked.append(layer)
            thresholds.append(threshold)
            left_in &= self._scores[:, column] < np.asarray(threshold, dtype=self._scores.dtype)
        return ExitRule(self._signal, tuple(asked), tuple(thresholds)) if asked else None


def stream_options(trace: Trace, name: str, gammas: np.ndarray) -> list[ExitRule | None]:
    """Return the rules worth simulating for a stream: full depth, every static depth, every signal at every dial.

    A signal is asked at every exit, or at one alone: where asking costs much beside a layer, one exit is often better.
    """
    stream = trace.streams[name]
    rules: list[ExitRule | None] = [None, *(ExitRule.static(layer) for layer in stream.layers)]
    asked = dict.fromkeys([tuple(stream.layers), *((layer,) for layer in stream.layers)])
    for signal in sorted(stream.scores):
        ranked = _Ranked(trace, stream, signal)
        rules += [ranked.rule(float(gamma), layers) for layers in asked for gamma in gammas]
    return list(dict.fromkeys(rules))  # without repeats, in order


def _smallest_threshold(ranked: np.ndarray, harm: np.ndarray, gamma: float) -> float:
    """Return the smallest of ``ranked`` scores, high to low, down to which harm is allowed; inf if none is."""
    if not len(ranked):
        return math.inf
    left = np.arange(1, len(ranked) + 1)
    allowed = (np.cumsum(harm) + 0.5) / (left + 1) <= gamma
    allowed &= np.append(ranked[1:] < ranked[:-1], True)  # equal scores leave together
    return float(ranked[np.flatnonzero(allowed)[-1]]) if allowed.any() else math.inf
