"""Rows that have positions in common, as beams do: nothing that they share is copied or computed again.

What a row has in common with another lies in one place: a table says in which row's buffers each position of each row
is. When rows go on from others, lines of that table are replaced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from lightning_mue.inference.schedule import Block, DecoderExits, Decoding, Executor, Place


class SharingExecutor(Executor, Protocol):
    """Runs layers for rows that share positions."""

    def share(self, owner_RT: np.ndarray) -> None:
        """From now on position ``t`` of row ``r`` is in row ``owner_RT[r, t]``; the table changes as rows go on."""


class SharingDecoding(Decoding):
    """One decode under way whose rows may go on from others.

    Attributes:
        owner: row -> position -> the row in whose buffers it lies, ``[R, T]``.
        done: layer -> (owner, position) that it has computed.
    """

    executor: SharingExecutor

    def __init__(
        self,
        executor: SharingExecutor,
        exits: DecoderExits,
        prompts: Sequence[Sequence[int]],
        end_ids: Sequence[int],
        steps: int,
    ) -> None:
        super().__init__(executor, exits, prompts, end_ids, steps)
        self.owner = np.arange(len(self.prompts))[:, None].repeat(max(self.before) + steps, 1)
        self.done: list[set[Place]] = [set() for _ in self.frontier]
        executor.share(self.owner)

    def _follow(self, rows: Sequence[int], parents: Sequence[int]) -> None:
        """Let rows go on from others, which are at one position, to the next."""
        self.owner[rows], position = self.owner[parents], self.at[parents[0]] + 1
        self.owner[rows, position:] = np.array(rows)[:, None]
        for of_layer in self.frontier:
            for row, frontier in zip(rows, [of_layer[parent] for parent in parents], strict=True):
                of_layer[row] = frontier
        for row in rows:
            self.at[row] = position

    def _missing(self, layer: int, last: Mapping[int, int]) -> list[Block]:
        """Leave out what another row has computed, or is to compute in this call: it comes before what is missing."""
        done, frontier = self.done[layer], self.frontier[layer]
        for row, stop in last.items():
            first, owner = frontier[row], self.owner[row].tolist()
            while first < stop and (owner[first], first) in done:
                first += 1
            frontier[row] = first
            done.update((owner[position], position) for position in range(first, stop))
        return super()._missing(layer, last)
