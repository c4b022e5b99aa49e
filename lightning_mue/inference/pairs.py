"""Pairs of a row and a position, and attention of them over two sets of keys. Arrays alone; no torch here.

Shapes: ``N`` pairs, ``H`` heads of ``d``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightning_mue.inference.ragged import attend
from lightning_mue.inference.schedule import Block

Array = np.ndarray
Keys = tuple[Array, Array, Array, Array, Array | None]
"""Keys and values, row and length of each pair, and bias or None, as `attend` takes them."""


def runs(numbers: Sequence[int], most: int) -> list[tuple[int, int]]:
    """Return ``first, last + 1`` of runs of adjacent numbers, of at most so many each."""
    found: list[tuple[int, int]] = []
    for n in sorted(numbers):
        if found and found[-1][1] == n < found[-1][0] + most:
            found[-1] = found[-1][0], n + 1
        else:
            found.append((n, n + 1))
    return found


def pairs(pending: Sequence[Block]) -> tuple[Array, Array]:
    """Return row and position, int64 ``[N]``, of all that is pending; the positions of a row lie together."""
    rows = [row for first, last, group in pending for row in group for _ in range(first, last)]
    positions = [position for first, last, group in pending for _ in group for position in range(first, last)]
    return np.array(rows), np.array(positions)


def attend_both(q_NHd: Array, one: Keys, other: Keys, threads: int, back_HT: Array | None) -> Array:
    """Return what one softmax over two sets of keys reads: each set alone, weighted by its share of the sum.

    Args:
        q_NHd: float32 queries, scaled already.
        one: a set of keys.
        other: another.
        threads: of each.
        back_HT: what `attend` adds to the first set's scores.
    """
    logsum_2NH = np.empty((2, *q_NHd.shape[:2]), np.float32)
    of_one_NHd = attend(q_NHd, *one, threads=threads, back_HT=back_HT, logsum_NH=logsum_2NH[0])
    of_other_NHd = attend(q_NHd, *other, threads=threads, logsum_NH=logsum_2NH[1])
    share_2NH = np.exp(logsum_2NH - np.logaddexp(*logsum_2NH))
    read_NHd: Array = share_2NH[0, ..., None] * of_one_NHd + share_2NH[1, ..., None] * of_other_NHd
    return read_NHd
