"""The schedule of one decode: which rows go through which layer over which positions. Integers only; no torch here.

Just-in-time features (DEED, section 3): a token that left early has no K/V in deeper layers. When a later token of the
same row goes there, the missing positions, which are always the last ones, join its matmul. So every (position, layer)
is computed at most once and exactly as at full depth. A fill mode other than that makes up the K/V of missing positions
(but of the latest ``backlog``) from what lies below, at the same moment.

A decoder prompt is made of positions that leave before layer 1: nothing is chosen there, and the first layer runs over
them only when the first answer token asks for it. They are always computed, under every fill mode.

With drafting nothing is lost (verified mode): tokens chosen at exits are drafts, and catching up with them is what
verifies them. Where the last layer would have chosen another token, the row goes back there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

Block = tuple[int, int, Sequence[int]]
"""Positions ``first .. last - 1`` of some rows."""

Place = tuple[int, int]
"""A row and a position."""


class Executor(Protocol):
    """Runs layers; the schedule says which. Rows, layers (from 1) and positions are integers, states stay inside."""

    num_layers: int

    def embed(self, rows: Sequence[int], first: int, tokens: Sequence[Sequence[int]]) -> None:
        """Compute the states that enter layer 1 for new tokens, equally many per row, from position ``first`` on."""

    def run_layer(self, layer: int, pending: Sequence[Block]) -> None:
        """Push blocks of positions through one layer, writing its K/V."""

    def fill(self, mode: str, layer: int, rows: Sequence[int], first: int, last: int) -> None:
        """Make up one layer's K/V of positions ``first .. last - 1`` from the layer below, without running it."""

    def score(self, signal: str, layer: int, places: Sequence[Place]) -> list[float]:
        """Return exit scores after ``layer``; higher = safer."""

    def choose(self, exits: Mapping[int, Sequence[Place]]) -> dict[Place, int]:
        """Return the next token of each place, given by exit layer; the vocabulary head runs once."""


class Drafting(Protocol):
    """Decides how far to draft before the last layer is asked."""

    def length(self) -> int:
        """Return how many positions of a row the last layer settles together; 1: no drafts."""

    def saw(self, depths: Sequence[int], agreed: int) -> None:
        """Learn that tokens were drafted at these depths, and that the first ``agreed`` of them were right."""


@dataclass(frozen=True)
class DecoderExits:
    """The decoder's rule as the schedule needs it.

    Args:
        signal: what scores.
        thresholds: step (counted from a row's first answer token) -> exit layer -> threshold.
        kv_fill: how missing K/V come to be.
        backlog: so many of the latest missing positions are computed all the same.
        forced: row -> exit depth of each token, whatever the signal: to replay known depths.
        drafting: what leaves early is a draft, which the last layer settles; None: it is the answer.
    """

    signal: str
    thresholds: Callable[[int], Mapping[int, float]]
    kv_fill: str = "just-in-time"
    backlog: int = 0
    forced: Sequence[Sequence[int]] | None = None
    drafting: Drafting | None = None


@dataclass
class DecodeRecord:
    """What a decode did.

    Args:
        tokens: row -> tokens chosen, end token included, prompt left out.
        depths: row -> exit depth of each token.
        layer_runs: layer executions: blocks given to ``run_layer``.
        pairs: computed (position, layer) pairs.
        filled: (position, layer) pairs whose K/V were made up instead.
        drafted: tokens that the last layer was asked to settle.
        agreed: of them, those that it would have chosen itself.
    """

    tokens: list[list[int]]
    depths: list[list[int]]
    layer_runs: int = 0
    pairs: int = 0
    filled: int = 0
    drafted: int = 0
    agreed: int = 0


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
    return Decoding(executor, exits, prompts, end_ids, steps).run()


class Decoding:
    """One decode under way.

    Attributes:
        frontier: layer -> row -> the first position whose K/V it misses.
        before: row -> positions before the one that chooses the first answer token.
        at: row -> the position under way.
        settled: row -> the first position whose token is a draft.
    """

    def __init__(
        self,
        executor: Executor,
        exits: DecoderExits,
        prompts: Sequence[Sequence[int]],
        end_ids: Sequence[int],
        steps: int,
    ) -> None:
        self.executor, self.exits, self.prompts, self.end_ids, self.steps = executor, exits, prompts, end_ids, steps
        self.before = [len(prompt) - 1 for prompt in prompts]
        self.settled, self.at = list(self.before), [min(self.before)] * len(prompts)
        self.record = DecodeRecord([[] for _ in prompts], [[] for _ in prompts])
        self.frontier = [[0] * len(prompts) for _ in range(executor.num_layers + 1)]

    def run(self) -> DecodeRecord:
        """Decode all rows."""
        live, tokens = self._begin(), self.record.tokens
        if shared := min(self.before):
            self.executor.embed(live, 0, [self.prompts[r][:shared] for r in live])
        while live:
            for position, rows in grouped(self.at, live):
                self.executor.embed(rows, position, [[self._given(r, position)] for r in rows])
            self._choose([r for r in live if self.at[r] >= self.before[r]])
            for r in live:
                self.at[r] = self.before[r] + len(tokens[r]) if tokens[r] else self.at[r] + 1
            live = self._going(live)
        return self.record

    def _begin(self) -> list[int]:
        """Return the rows that are there from the start."""
        return list(range(len(self.prompts)))

    def _going(self, live: list[int]) -> list[int]:
        """Return the rows that go on."""
        tokens = self.record.tokens
        return [r for r in live if not tokens[r] or not self._is_last(tokens[r])]

    def _given(self, row: int, position: int) -> int:
        prompt = self.prompts[row]
        return prompt[position] if position < len(prompt) else self.record.tokens[row][position - len(prompt)]

    def _is_last(self, tokens: Sequence[int]) -> bool:
        """Whether nothing follows some tokens of an answer."""
        return tokens[-1] in self.end_ids or len(tokens) == self.steps

    def _choose(self, rows: list[int]) -> None:
        """Give each row its next token."""
        if not rows:
            return
        left = self._climb(rows)
        arrived = left.pop(self.executor.num_layers, []) if self.exits.drafting is not None else []
        chosen = self.executor.choose({k: [(r, self.at[r]) for r in group] for k, group in left.items()})
        for layer, group in left.items():
            for row in group:
                self.record.tokens[row].append(chosen[row, self.at[row]])
                self.record.depths[row].append(layer)
        if self.exits.drafting is not None:
            ended = [r for group in left.values() for r in group if self._is_last(self.record.tokens[r])]
            self._verify([*arrived, *ended], self.exits.drafting)

    def _climb(self, rows: list[int]) -> dict[int, list[int]]:
        """Take one step's rows up the layers; return exit layer -> rows that left there."""
        left: dict[int, list[int]] = {}
        thresholds = self._thresholds(rows)
        for layer in range(1, self.executor.num_layers + 1):
            if self.exits.kv_fill != "just-in-time":
                self._fill(layer, {r: self.at[r] - self.exits.backlog for r in rows})
            self._run_layer(layer, {r: self.at[r] + 1 for r in rows})
            if layer == self.executor.num_layers:
                left[layer] = rows
            elif leaving := self._leaving(layer, rows, thresholds):
                left[layer] = leaving
                gone = set(leaving)
                rows = [r for r in rows if r not in gone]
            if not rows:
                break
        return {layer: group for layer, group in left.items() if group}

    def _thresholds(self, rows: list[int]) -> dict[int, Mapping[int, float]]:
        """Return row -> exit layer -> threshold; nothing for rows whose drafts are to be settled now."""
        at = {r: len(self.record.tokens[r]) for r in rows}
        if self.exits.drafting is not None:
            most = self.exits.drafting.length()
            at = {r: n for r, n in at.items() if self.at[r] - self.settled[r] + 1 < most and n + 1 < self.steps}
        if (forced := self.exits.forced) is not None:
            return {r: {forced[r][n]: -math.inf} for r, n in at.items() if n < len(forced[r])}
        at_step = {n: self.exits.thresholds(n) for n in {*at.values()}}
        return {r: at_step[n] for r, n in at.items()}

    def _run_layer(self, layer: int, last: Mapping[int, int]) -> None:
        """Compute what ``layer`` misses of each row before its position ``last``."""
        pending = self._missing(layer, last)
        if pending:
            self.executor.run_layer(layer, pending)
            self.record.layer_runs += len(pending)
            self.record.pairs += self._advance(layer, pending)

    def _leaving(self, layer: int, rows: list[int], thresholds: Mapping[int, Mapping[int, float]]) -> list[int]:
        """Return the rows that leave after ``layer``."""
        asked = [r for r in rows if layer in thresholds.get(r, ())]
        if not asked or self.exits.forced is not None:
            return asked
        scores = self.executor.score(self.exits.signal, layer, [(r, self.at[r]) for r in asked])
        return [r for r, s in zip(asked, scores, strict=True) if s >= thresholds[r][layer]]

    def _fill(self, layer: int, last: Mapping[int, int]) -> None:
        """Make up what ``layer`` misses of each row before its position ``last``; of a prompt nothing is made up."""
        last = {r: n for r, n in last.items() if max(self.frontier[layer][r], self.before[r]) < n}
        self._run_layer(layer, {r: self.before[r] for r in last})
        pending = self._missing(layer, last)
        for first, stop, group in pending:
            self.executor.fill(self.exits.kv_fill, layer, group, first, stop)
        self.record.filled += self._advance(layer, pending)

    def _verify(self, rows: list[int], drafting: Drafting) -> None:
        """Let the last layer choose at all positions of these rows that hold drafts, and at those under way."""
        if not rows:
            return
        for layer in range(1, self.executor.num_layers + 1):
            self._run_layer(layer, {r: self.at[r] + 1 for r in rows})
        open_places = {r: [(r, p) for p in range(self.settled[r], self.at[r] + 1)] for r in rows}
        chosen = self.executor.choose({self.executor.num_layers: [place for r in rows for place in open_places[r]]})
        for row in rows:
            self._settle(row, [chosen[place] for place in open_places[row]], drafting)

    def _settle(self, row: int, best: list[int], drafting: Drafting) -> None:
        """Keep the drafts up to the first that is not the best token, and put that in its place."""
        tokens, depths = self.record.tokens[row], self.record.depths[row]
        first = self.settled[row] - self.before[row]
        drafts, drafted_at = tokens[first:], depths[first:]
        agreed = next((i for i, (a, b) in enumerate(zip(drafts, best, strict=False)) if a != b), len(drafts))
        tokens[first + agreed :] = best[agreed : agreed + 1]
        depths[first + agreed :] = [self.executor.num_layers] * len(best[agreed : agreed + 1])
        self.settled[row] = self.before[row] + len(tokens)
        for of_layer in self.frontier:
            of_layer[row] = min(of_layer[row], self.settled[row])
        self.record.drafted += len(drafts)
        self.record.agreed += agreed
        drafting.saw(drafted_at, agreed)

    def _missing(self, layer: int, last: Mapping[int, int]) -> list[Block]:
        """Return what ``layer`` misses of each row before its position ``last``, the earliest first."""
        blocks: dict[tuple[int, int], list[int]] = {}
        for row, stop in last.items():
            if (first := self.frontier[layer][row]) < stop:
                blocks.setdefault((first, stop), []).append(row)
        return [(first, stop, rows) for (first, stop), rows in sorted(blocks.items())]

    def _advance(self, layer: int, done: Sequence[Block]) -> int:
        """Note that a layer has its K/V of some blocks; return of how many positions."""
        for _, last, rows in done:
            for row in rows:
                self.frontier[layer][row] = last
        return sum((last - first) * len(rows) for first, last, rows in done)


def grouped(numbers: Sequence[int], rows: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Group ``rows`` by their number, lowest first."""
    groups: dict[int, list[int]] = {}
    for row in rows:
        groups.setdefault(numbers[row], []).append(row)
    return sorted(groups.items())
