"""The schedule of one decode: which rows go through which layer over which positions. Integers only; no torch here.

Just-in-time features (DEED, section 3): a token that left early has no K/V in deeper layers. When a later token of the
same row goes there, the missing positions, which are always the last ones, join its matmul. So every (position, layer)
is computed at most once and exactly as at full depth. A fill mode other than that makes up the K/V of missing positions
(but of the latest ``backlog``) from what lies below, at the same moment.

A decoder prompt is made of positions that leave before layer 1: nothing is chosen there, and the first layer runs over
them only when the first answer token asks for it. They are always computed, under every fill mode.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

Blocks = Sequence[tuple[int, Sequence[int]]]
"""The first position that is missing, and the rows that miss it; one block or more."""


class Executor(Protocol):
    """Runs layers; the schedule says which. Rows, layers (from 1) and positions are integers, states stay inside."""

    num_layers: int

    def embed(self, rows: Sequence[int], first: int, tokens: Sequence[Sequence[int]]) -> None:
        """Compute the states that enter layer 1 for new tokens, equally many per row, from position ``first`` on."""

    def run_layer(self, layer: int, pending: Blocks, last: int) -> None:
        """Push positions ``first .. last - 1`` of each block's rows through one layer, writing its K/V."""

    def fill(self, mode: str, layer: int, rows: Sequence[int], first: int, last: int) -> None:
        """Make up one layer's K/V of positions ``first .. last - 1`` from the layer below, without running it."""

    def score(self, signal: str, layer: int, rows: Sequence[int], position: int) -> list[float]:
        """Return each row's exit score after ``layer`` at ``position``; higher = safer."""

    def choose(self, exits: Mapping[int, Sequence[int]], position: int) -> dict[int, int]:
        """Return row -> next token for rows grouped by exit layer; the vocabulary head runs once."""


@dataclass(frozen=True)
class DecoderExits:
    """The decoder's rule as the schedule needs it.

    Args:
        signal: what scores.
        thresholds: step (counted from a row's first answer token) -> exit layer -> threshold.
        kv_fill: how missing K/V come to be.
        backlog: so many of the latest missing positions are computed all the same.
        forced: row -> exit depth of each token, whatever the signal: to replay known depths.
    """

    signal: str
    thresholds: Callable[[int], Mapping[int, float]]
    kv_fill: str = "just-in-time"
    backlog: int = 0
    forced: Sequence[Sequence[int]] | None = None


@dataclass
class DecodeRecord:
    """What a decode did.

    Args:
        tokens: row -> tokens chosen, end token included, prompt left out.
        depths: row -> exit depth of each token.
        layer_runs: layer executions: blocks given to ``run_layer``.
        pairs: computed (position, layer) pairs.
        filled: (position, layer) pairs whose K/V were made up instead.
    """

    tokens: list[list[int]]
    depths: list[list[int]]
    layer_runs: int = 0
    pairs: int = 0
    filled: int = 0


def decode(
    executor: Executor,
    exits: DecoderExits,
    prompts: Sequence[Sequence[int]],
    end_ids: Sequence[int],
    steps: int,
) -> DecodeRecord:
    """Decode greedily; every row leaves each step at its own layer.

    Args:
        executor: what computes.
        exits: when to leave.
        prompts: row -> tokens that are given: the start token, and a decoder prompt if there is one.
        end_ids: a row that chooses one of them is done.
        steps: tokens to choose at most.
    """
    return _Decoding(executor, exits, prompts).run(end_ids, steps)


class _Decoding:
    """One decode under way.

    Attributes:
        frontier: layer -> row -> the first position whose K/V it misses.
        before: row -> positions before the one that chooses the first answer token.
    """

    def __init__(self, executor: Executor, exits: DecoderExits, prompts: Sequence[Sequence[int]]) -> None:
        self.executor, self.exits, self.prompts = executor, exits, prompts
        self.before = [len(prompt) - 1 for prompt in prompts]
        self.record = DecodeRecord([[] for _ in prompts], [[] for _ in prompts])
        self.frontier = [[0] * len(prompts) for _ in range(executor.num_layers + 1)]

    def run(self, end_ids: Sequence[int], steps: int) -> DecodeRecord:
        live = list(range(len(self.prompts)))
        shared = min(self.before)
        if shared:
            self.executor.embed(live, 0, [prompt[:shared] for prompt in self.prompts])
        for position in range(shared, max(self.before) + steps):
            self.executor.embed(live, position, [[self._given(r, position)] for r in live])
            asking = [r for r in live if position >= self.before[r]]
            chosen = self._choose(asking, position)
            live = [r for r in live if chosen.get(r) not in end_ids and position + 1 < self.before[r] + steps]
            if not live:
                break
        return self.record

    def _given(self, row: int, position: int) -> int:
        prompt = self.prompts[row]
        return prompt[position] if position < len(prompt) else self.record.tokens[row][position - len(prompt)]

    def _choose(self, rows: list[int], position: int) -> dict[int, int]:
        """Return row -> its next token."""
        if not rows:
            return {}
        left = self._climb(rows, position)
        chosen = self.executor.choose(left, position)
        for layer, group in left.items():
            for row in group:
                self.record.tokens[row].append(chosen[row])
                self.record.depths[row].append(layer)
        return chosen

    def _climb(self, rows: list[int], position: int) -> dict[int, list[int]]:
        """Take one step's rows up the layers; return exit layer -> rows that left there."""
        left: dict[int, list[int]] = {}
        steps = {position - self.before[r] for r in rows}
        at_step = {step: self.exits.thresholds(step) for step in steps}
        thresholds = {r: at_step[position - self.before[r]] for r in rows}
        for layer in range(1, self.executor.num_layers + 1):
            if self.exits.kv_fill != "just-in-time":
                self._fill(layer, rows, position - self.exits.backlog)
            self._run_layer(layer, rows, position + 1)
            if layer == self.executor.num_layers:
                left[layer] = rows
            elif leaving := self._leaving(layer, rows, position, thresholds):
                left[layer] = leaving
                gone = set(leaving)
                rows = [r for r in rows if r not in gone]
            if not rows:
                break
        return {layer: group for layer, group in left.items() if group}

    def _run_layer(self, layer: int, rows: list[int], last: int) -> None:
        """Compute what ``layer`` misses before position ``last``."""
        pending = [(first, group) for first, group in pending_blocks(self.frontier[layer], rows) if first < last]
        if pending:
            self.executor.run_layer(layer, pending, last)
            self.record.layer_runs += len(pending)
        for first, group in pending:
            self.record.pairs += (last - first) * len(group)
            self._advance(layer, group, last)

    def _leaving(
        self, layer: int, rows: list[int], position: int, thresholds: Mapping[int, Mapping[int, float]]
    ) -> list[int]:
        """Return the rows that leave after ``layer``."""
        if (forced := self.exits.forced) is not None:
            at = {r: position - self.before[r] for r in rows}
            return [r for r in rows if at[r] < len(forced[r]) and forced[r][at[r]] == layer]
        if not (asked := [r for r in rows if layer in thresholds[r]]):
            return []
        scores = self.executor.score(self.exits.signal, layer, asked, position)
        return [r for r, s in zip(asked, scores, strict=True) if s >= thresholds[r][layer]]

    def _fill(self, layer: int, rows: list[int], last: int) -> None:
        """Make up what ``layer`` misses before position ``last``; a prompt that it misses is computed."""
        rows = [r for r in rows if max(self.frontier[layer][r], self.before[r]) < last]
        for before in sorted({self.before[r] for r in rows}):
            self._run_layer(layer, [r for r in rows if self.before[r] == before], before)
        for first, group in pending_blocks(self.frontier[layer], rows):
            self.executor.fill(self.exits.kv_fill, layer, group, first, last)
            self.record.filled += (last - first) * len(group)
            self._advance(layer, group, last)

    def _advance(self, layer: int, rows: list[int], last: int) -> None:
        for row in rows:
            self.frontier[layer][row] = last


def pending_blocks(frontier: Sequence[int], rows: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Group ``rows`` by the first position they still miss: one rectangular block each, earliest first."""
    blocks: dict[int, list[int]] = {}
    for row in rows:
        blocks.setdefault(frontier[row], []).append(row)
    return sorted(blocks.items())
