"""What a call of a decoder layer costs in a batch, from calls that are timed where a decode makes them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

import numpy as np
from decode_case import START, Case

from lightning_mue.inference.schedule import Executor

POSITIONS = (1, 2, 4)

Calls = Iterable[tuple[int, int]]
"""Calls of a layer: rows, and (row, position) pairs."""


@dataclass(frozen=True)
class CallCost:
    """Milliseconds of a layer's call, between those that were timed and on from the last.

    Args:
        rows: that took part in calls, ascending.
        ms: of these rows -> of ``POSITIONS`` positions of each.
    """

    rows: tuple[int, ...]
    ms: tuple[tuple[float, ...], ...]

    def of(self, calls: Calls) -> float:
        """Return the milliseconds of some calls."""
        return sum(self._of(rows, pairs / rows) for rows, pairs in calls)

    def _of(self, rows: int, positions: float) -> float:
        at = [float(np.interp(rows, self.rows, ms)) for ms in zip(*self.ms, strict=True)]
        beyond = max(0.0, positions - POSITIONS[-1]) / (POSITIONS[-1] - POSITIONS[-2])
        return float(np.interp(positions, POSITIONS, at)) + beyond * (at[-1] - at[-2])


@dataclass(frozen=True)
class StepCost:
    """Milliseconds of a step's pieces.

    Args:
        layer: of a layer's call.
        rest: of embeddings and head, all rows together.
    """

    layer: CallCost
    rest: float


def timed_steps(case: Case, executor: Executor, repeats: int) -> StepCost:
    """Time steps, each with all layers in turn: for one row, half of them, all but one, and all."""
    every, layers = list(range(case.batch)), case.shape.layers
    executor.embed(every, 0, [[START] * max(POSITIONS)] * case.batch)
    for layer in range(1, layers + 1):  # all states are there, and the memory's K/V
        executor.run_layer(layer, [(0, max(POSITIONS), every)])
    groups = {len(group): group for group in (every[:1], every[::2], [every[0], *every[2:]], every)}
    shapes = [(rows, positions) for rows in sorted(groups) for positions in POSITIONS]
    calls: dict[tuple[int, int], list[float]] = {shape: [] for shape in shapes}
    rest: list[float] = []
    for turn in range(repeats + 1):
        for rows, positions in shapes:
            begin = case.clock()
            executor.embed(every, 0, [[START]] * case.batch)
            embedded = case.clock()
            for layer in range(1, layers + 1):
                executor.run_layer(layer, [(0, positions, groups[rows])])
            climbed = case.clock()
            executor.choose({layers: [(row, 0) for row in every]})
            if turn:  # the first warms
                calls[rows, positions].append((climbed - embedded) * 1e3 / layers)
                rest.append((case.clock() - climbed + embedded - begin) * 1e3)
    ms = tuple(tuple(median(calls[rows, positions]) for positions in POSITIONS) for rows in sorted(groups))
    return StepCost(CallCost(tuple(sorted(groups)), ms), median(rest))
