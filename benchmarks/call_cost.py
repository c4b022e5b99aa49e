"""What a call of a decoder layer costs in a batch: so much for its weights, so much for each row and each position."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from decode_case import START, Case

from lightning_mue.inference.schedule import Executor

POSITIONS = (1, 2, 4)

Calls = Iterable[tuple[int, int]]
"""Calls of a layer: rows, and (row, position) pairs."""


@dataclass(frozen=True)
class CallCost:
    """Milliseconds of a layer's call.

    Args:
        call: of any.
        row: of each row.
        more: of each position of a row beside its first.
        apart: of each row beside that, where rows that lie between are left out.
    """

    call: float
    row: float
    more: float
    apart: float = 0.0

    def of(self, calls: Calls) -> float:
        """Return the milliseconds of some calls, of rows side by side."""
        return sum(self.call + self.row * rows + self.more * (pairs - rows) for rows, pairs in calls)

    def of_block(self, rows: Sequence[int], pairs: int) -> float:
        """Return the milliseconds of a call of these rows."""
        return self.of([(len(rows), pairs)]) + self.apart * len(rows) * are_apart(rows)


def are_apart(rows: Sequence[int]) -> bool:
    """Whether rows that lie between these are left out."""
    return len(rows) <= max(rows) - min(rows)


def fitted(case: Case, executor: Executor, repeats: int) -> CallCost:
    """Time calls of all layers in turn, for some and for all rows, and fit the costs."""
    every = list(range(case.batch))
    executor.embed(every, 0, [[START] * max(POSITIONS)] * case.batch)
    groups = [list(group) for group in sorted({(0,), tuple(every[::2]), tuple(every)})]
    shapes = [(group, positions) for group in groups for positions in POSITIONS]
    ms: list[list[float]] = [[] for _ in shapes]
    for turn in range(repeats + 1):
        for (rows, positions), found in zip(shapes, ms, strict=True):
            begin = case.clock()
            for layer in range(1, case.shape.layers + 1):
                executor.run_layer(layer, [(0, positions, rows)])
            if turn:  # the memory's K/V are projected in the first
                found.append((case.clock() - begin) * 1e3 / case.shape.layers)
    terms = [[1, len(r), len(r) * (n - 1), len(r) * are_apart(r)] for r, n in shapes]
    if case.batch == 1:  # its memory cannot be told from the weights
        terms = [[call, 0, more, apart] for call, _, more, apart in terms]
    costs = np.linalg.lstsq(np.array(terms, float), np.array([np.median(found) for found in ms]), rcond=None)[0]
    return CallCost(*map(float, costs))
