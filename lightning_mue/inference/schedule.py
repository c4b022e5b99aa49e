"""The schedule of one decode: which rows go through which layer over which positions. Integers only; no torch here.

Just-in-time features (DEED, section 3): a token that left early has no K/V in deeper layers. When a later token of the
same row goes there, the missing positions, which are always the last ones, join its matmul. So every (position, layer)
is computed at most once and exactly as at full depth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol


class Executor(Protocol):
    """Runs layers; the schedule says which. Rows, layers (from 1) and positions are integers, states stay inside."""

    num_layers: int

    def embed(self, rows: Sequence[int], position: int, tokens: Sequence[int]) -> None:
        """Compute the states that enter layer 1 for one new token per row."""

    def run_layer(self, layer: int, rows: Sequence[int], first: int, last: int) -> None:
        """Push positions ``first .. last - 1`` of ``rows`` through one layer, writing its K/V."""

    def score(self, signal: str, layer: int, rows: Sequence[int], position: int) -> list[float]:
        """Return each row's exit score after ``layer`` at ``position``; higher = safer."""

    def choose(self, exits: Mapping[int, Sequence[int]], position: int) -> dict[int, int]:
        """Return row -> next token for rows grouped by exit layer; the vocabulary head runs once."""


@dataclass(frozen=True)
class DecoderExits:
    """The decoder's rule as the schedule needs it: a signal and layer -> threshold."""

    signal: str = "static"
    thresholds: Mapping[int, float] = field(default_factory=dict)


@dataclass
class DecodeRecord:
    """What a decode did.

    Args:
        tokens: row -> tokens chosen, end token included.
        depths: row -> exit depth of each token.
        layer_runs: layer executions (calls of ``run_layer``).
        pairs: computed (position, layer) pairs.
    """

    tokens: list[list[int]]
    depths: list[list[int]]
    layer_runs: int = 0
    pairs: int = 0


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
    for layer in range(1, executor.num_layers + 1):
        for first, group in pending_blocks(frontier[layer], rows):
            executor.run_layer(layer, group, first, position + 1)
            record.layer_runs += 1
            record.pairs += (position + 1 - first) * len(group)
            for row in group:
                frontier[layer][row] = position + 1
        threshold = exits.thresholds.get(layer)
        if layer == executor.num_layers:
            left[layer] = rows
        elif threshold is not None:
            scores = executor.score(exits.signal, layer, rows, position)
            leaving = [r for r, s in zip(rows, scores, strict=True) if s >= threshold]
            if leaving:
                left[layer] = leaving
                rows = [r for r, s in zip(rows, scores, strict=True) if not s >= threshold]
        if not rows:
            break
    return {layer: group for layer, group in left.items() if group}


def pending_blocks(frontier: Sequence[int], rows: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Group ``rows`` by the first position they still miss: one rectangular block each, earliest first."""
    blocks: dict[int, list[int]] = {}
    for row in rows:
        blocks.setdefault(frontier[row], []).append(row)
    return sorted(blocks.items())
