"""The schedule of one decode: which rows go through which layer over which positions. Integers only; no torch here.

Just-in-time features (DEED, section 3): a token that left early has no K/V in deeper layers. When a later token of the
same row goes there, the missing positions, which are always the last ones, join its matmul. So every (position, layer)
is computed at most once and exactly as at full depth. A fill mode other than that makes up the K/V of missing positions
(but of the latest ``backlog``) from what lies below, at the same moment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


class Executor(Protocol):
    """Runs layers; the schedule says which. Rows, layers (from 1) and positions are integers, states stay inside."""

    num_layers: int

    def embed(self, rows: Sequence[int], position: int, tokens: Sequence[int]) -> None:
        """Compute the states that enter layer 1 for one new token per row."""

    def run_layer(self, layer: int, rows: Sequence[int], first: int, last: int) -> None:
        """Push positions ``first .. last - 1`` of ``rows`` through one layer, writing its K/V."""

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
        thresholds: step -> exit layer -> threshold.
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
        tokens: row -> tokens chosen, end token included.
        depths: row -> exit depth of each token.
        layer_runs: layer executions (calls of ``run_layer``).
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
    rows: int,
    start_id: int,
    end_ids: Sequence[int],
    steps: int,
    on_step: Callable[[int], None] | None = None,
) -> DecodeRecord:
    """Decode greedily; every row leaves each step at its own layer.

    Args:
        executor: what computes.
        exits: when to leave.
        rows: batch size.
        start_id: the token at position 0.
        end_ids: a row that chooses one of them is done.
        steps: tokens at most.
        on_step: called with the number of rows still decoding after each step.
    """
    record = DecodeRecord([[] for _ in range(rows)], [[] for _ in range(rows)])
    frontier = [[0] * rows for _ in range(executor.num_layers + 1)]
    live = list(range(rows))
    for position in range(steps):
        executor.embed(live, position, [record.tokens[r][-1] if position else start_id for r in live])
        left = _climb(executor, exits, live, position, frontier, record)
        chosen = executor.choose(left, position)
        for layer, group in left.items():
            for row in group:
                record.tokens[row].append(chosen[row])
                record.depths[row].append(layer)
        live = [r for r in live if chosen[r] not in end_ids]
        if on_step is not None:
            on_step(len(live))
        if not live:
            break
    return record


def _climb(
    executor: Executor,
    exits: DecoderExits,
    rows: list[int],
    position: int,
    frontier: list[list[int]],
    record: DecodeRecord,
) -> dict[int, list[int]]:
    """Take one step's rows up the layers; return exit layer -> rows that left there."""
    left: dict[int, list[int]] = {}
    thresholds = exits.thresholds(position)
    for layer in range(1, executor.num_layers + 1):
        if exits.kv_fill != "just-in-time":
            _fill(executor, exits.kv_fill, layer, rows, position - exits.backlog, frontier[layer], record)
        for first, group in pending_blocks(frontier[layer], rows):
            executor.run_layer(layer, group, first, position + 1)
            record.layer_runs += 1
            record.pairs += (position + 1 - first) * len(group)
            for row in group:
                frontier[layer][row] = position + 1
        if layer == executor.num_layers:
            left[layer] = rows
        elif leaving := _leaving(executor, exits, layer, rows, position, thresholds.get(layer)):
            left[layer] = leaving
            gone = set(leaving)
            rows = [r for r in rows if r not in gone]
        if not rows:
            break
    return {layer: group for layer, group in left.items() if group}


def _leaving(
    executor: Executor, exits: DecoderExits, layer: int, rows: list[int], position: int, threshold: float | None
) -> list[int]:
    """Return the rows that leave after ``layer``."""
    if exits.forced is not None:
        return [r for r in rows if position < len(exits.forced[r]) and exits.forced[r][position] == layer]
    if threshold is None:
        return []
    scores = executor.score(exits.signal, layer, rows, position)
    return [r for r, s in zip(rows, scores, strict=True) if s >= threshold]


def _fill(
    executor: Executor, mode: str, layer: int, rows: list[int], last: int, frontier: list[int], record: DecodeRecord
) -> None:
    """Make up what ``layer`` misses before position ``last``."""
    for first, group in pending_blocks(frontier, rows):
        if first < last:
            executor.fill(mode, layer, group, first, last)
            record.filled += (last - first) * len(group)
            for row in group:
                frontier[row] = last


def pending_blocks(frontier: Sequence[int], rows: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Group ``rows`` by the first position they still miss: one rectangular block each, earliest first."""
    blocks: dict[int, list[int]] = {}
    for row in rows:
        blocks.setdefault(frontier[row], []).append(row)
    return sorted(blocks.items())
