"""Dials: one number for a stream's whole rule, so that no search runs over many thresholds (calibration notes, 5)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from lightning_mue.calibration.rows import StreamRows
from lightning_mue.policy import SIGNAL_RANGES, ExitRule

GRID = 2.0**-20
"""Thresholds are multiples of this: exact in float32, and blind to the last bits in which two runs differ."""

DECAYS = ((0.9, 4.0),)
"""How a decoder's thresholds may fall with the step, beside not at all: as in CALM, equation 5."""


class Dials:
    """One signal of one stream; turns a rate of harm into a rule.

    Args:
        rows: of the stream.
        signal: one of those it has.
        decay: of the thresholds, as in ``ExitRule``.
    """

    def __init__(self, rows: StreamRows, signal: str, decay: tuple[float, float] | None = None) -> None:
        self._layers, self._signal, self._decay, self._harm = rows.layers, signal, decay, rows.harm
        self._scores = rows.scores[signal]
        if decay is not None:  # beta * threshold + rise <= score, solved for the threshold
            zero = ExitRule(signal, rows.layers[:1], (0.0,), decay)
            rise = np.array([zero.thresholds_at(step, rows.steps)[rows.layers[0]] for step in range(rows.steps)])
            self._scores = [((scores - rise[rows.step]) / decay[0]).astype(np.float32) for scores in self._scores]
        self._order = [np.argsort(-scores) for scores in self._scores]
        self._first = [_harm_down_to(s[o], h[o]) for s, h, o in zip(self._scores, self._harm, self._order, strict=True)]

    def rule(self, gamma: float, layers: Sequence[int] | None = None) -> ExitRule | None:
        """Return the rule that leaves at each exit as often as harm allows; None if it could never leave.

        From the first exit on: the smallest observed score such that, among those that have not left before and score
        at least that, the estimated rate of harm is at most ``gamma``. Harm is a token that differs from full depth
        (decoder) or an output that does (other streams). The estimate is ``(harmed + 1/2) / (left + 1)``: few
        observations allow little.

        Args:
            gamma: the rate of harm allowed among those leaving, in (0, 1).
            layers: the exits that may ask; all if not given.
        """
        left_in: np.ndarray | None = None  # all
        asked, thresholds = [], []
        low, high = SIGNAL_RANGES[self._signal]
        for e, layer in enumerate(self._layers):
            if layers is not None and layer not in layers:
                continue
            scores = self._scores[e]
            if left_in is None:
                threshold = _smallest(*self._first[e], gamma)
            else:
                order = self._order[e]
                order = order[left_in[order]]
                threshold = _smallest(*_harm_down_to(scores[order], self._harm[e][order]), gamma)
            threshold = max(math.floor(threshold / GRID) * GRID, low) if threshold < math.inf else math.inf
            if threshold > high:  # a falling threshold would have to begin above what the signal can score
                continue
            asked.append(layer)
            thresholds.append(threshold)
            stays = scores < np.float32(threshold)
            left_in = stays if left_in is None else left_in & stays
        return ExitRule(self._signal, tuple(asked), tuple(thresholds), self._decay) if asked else None


def stream_options(
    rows: StreamRows, gammas: np.ndarray, exits: Mapping[str, Sequence[int]] | None = None
) -> list[ExitRule | None]:
    """Return the rules worth simulating for a stream: full depth, every static depth, every signal at every dial.

    A signal is asked at every exit, or at one alone: where asking costs much beside a layer, one exit is often better.
    In the decoder thresholds may also fall with the step. ``exits`` are those at which each signal may be asked; all of
    them if not given.
    """
    rules: list[ExitRule | None] = [None, *(ExitRule.static(layer) for layer in rows.layers)]
    for signal in sorted(rows.scores):
        if not (layers := tuple(rows.layers if exits is None else exits[signal])):
            continue
        asked, dials = dict.fromkeys([layers, *((layer,) for layer in layers)]), Dials(rows, signal)
        rules += [dials.rule(float(gamma), at) for at, gamma in itertools.product(asked, gammas)]
        for decay in DECAYS if rows.is_decoder and rows.steps else ():
            falling = Dials(rows, signal, decay)
            rules += [falling.rule(float(gamma), layers) for gamma in gammas]
    return list(dict.fromkeys(rules))  # without repeats, in order


def _harm_down_to(ranked: np.ndarray, harm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return ``ranked`` scores, high to low, and the least estimated rate of harm down to there or further."""
    left = np.arange(1, len(ranked) + 1)
    rate = (np.cumsum(harm) + 0.5) / (left + 1)
    rate[:-1][ranked[1:] == ranked[:-1]] = np.inf  # equal scores leave together
    return ranked, np.minimum.accumulate(rate[::-1])[::-1]


def _smallest(ranked: np.ndarray, rate: np.ndarray, gamma: float) -> float:
    """Return the smallest of the ranked scores down to which harm is allowed; inf if none is."""
    allowed = np.searchsorted(rate, gamma, side="right")
    return float(ranked[allowed - 1]) if allowed else math.inf
