"""What the cost model predicts for lines of the decoders' cost table (``decode.py``), from pieces alone.

At batch 1 by the engine's latency tables. In a batch the schedule itself is run, by an executor that computes nothing
and adds up what its calls would cost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from call_cost import POSITIONS, CallCost, fitted
from decode_case import START, Case, Clock
from decode_lines import SCHEDULES, Line

from lightning_mue.calibration.cost import predicted_ms
from lightning_mue.inference.profile import measure_decoder
from lightning_mue.inference.schedule import Block, DecoderExits, Place, decode
from lightning_mue.inference.stopwatch import Stopwatch
from lightning_mue.inference.torch_executor import TorchExecutor
from lightning_mue.latency import LatencyTable

REPEATS = 9


@dataclass(frozen=True)
class Prices:
    """Milliseconds of a decode's pieces in a batch.

    Args:
        layer: of a layer's call.
        together: whether a call takes all blocks of positions, whatever they are; else each is one of its own.
        step: of embeddings and head, all rows together.
        memory: of the projection of one row's memory, a layer.
    """

    layer: CallCost
    together: bool
    step: float
    memory: float


class Priced:
    """An executor that computes nothing.

    Args:
        layers: of the decoder.
        prices: of its calls.

    Attributes:
        ms: of all calls so far.
    """

    def __init__(self, layers: int, prices: Prices) -> None:
        self.num_layers, self._prices, self.ms = layers, prices, 0.0
        self._projected: set[tuple[int, int]] = set()

    def embed(self, rows: Sequence[int], first: int, tokens: Sequence[Sequence[int]]) -> None:
        """A step begins, of all rows: none ends before the others."""
        self.ms += self._prices.step

    def run_layer(self, layer: int, pending: Sequence[Block]) -> None:
        """Pay for the call, or for that of each block, and for the memory of rows that are new here."""
        blocks = [([*rows], (last - first) * len(rows)) for first, last, rows in pending]
        if self._prices.together:
            blocks = [([row for rows, _ in blocks for row in rows], sum(pairs for _, pairs in blocks))]
        for rows, pairs in blocks:
            self.ms += self._prices.layer.of_block(rows, pairs)
            new = {(layer, row) for row in rows} - self._projected
            self.ms += self._prices.memory * len(new)
            self._projected |= new

    def fill(self, mode: str, layer: int, rows: Sequence[int], first: int, last: int) -> None:
        """Nothing is made up just in time."""

    def score(self, signal: str, layer: int, places: Sequence[Place]) -> list[float]:
        """Nothing is asked where depths are given."""
        return []

    def choose(self, exits: Mapping[int, Sequence[Place]]) -> dict[Place, int]:
        """Any token; the step has paid for the head."""
        return {place: START for places in exits.values() for place in places}


@torch.inference_mode()
def predictions(case: Case, lines: Mapping[str, Line]) -> dict[str, float]:
    """Return line -> milliseconds, of our engine's lines."""
    found: dict[str, float] = {}
    for name, line in lines.items():
        if line.executor_of is not None and line.full == name:
            predict = alone(case, line) if case.batch == 1 else together(case, line)
            found |= {name.replace("full", schedule): predict(case.depths[schedule]) for schedule in SCHEDULES}
    return found


Depths = Sequence[Sequence[int]]


def alone(case: Case, line: Line) -> Callable[[Depths], float]:
    """Return what predicts a decode of one row."""
    pieces = measure_decoder(_executor(case, line, case.shape.steps), START, case.shape.steps, REPEATS, case.clock)
    table = LatencyTable({}, pieces)
    return lambda depths: float(predicted_ms(table, {"decoder": np.array(depths)})["decoder"].sum())


def together(case: Case, line: Line) -> Callable[[Depths], float]:
    """Return what predicts a decode of a batch."""
    layers, rows = case.shape.layers, list(range(case.batch))
    executor = _executor(case, line, max(POSITIONS))
    cost = fitted(case, executor, REPEATS)

    def step() -> None:
        executor.embed(rows, 0, [[START]] * case.batch)
        executor.choose({layers: [(row, 0) for row in rows]})

    def memory() -> None:
        for layer in range(1, layers + 1):
            executor.project_memory(layer, rows)

    pieces = _timed(step, case.clock), _timed(memory, case.clock) / layers / case.batch
    prices = Prices(cost, not isinstance(executor, TorchExecutor), *pieces)

    def predict(depths: Depths) -> float:
        priced = Priced(layers, prices)
        exits = DecoderExits("static", lambda _step: {}, forced=depths)
        decode(priced, exits, [[START]] * case.batch, (), case.shape.steps)
        return priced.ms

    return predict


def _executor(case: Case, line: Line, positions: int) -> Any:
    assert line.executor_of is not None
    silent = Stopwatch(torch.device("cpu"), False)
    return line.executor_of(case)(None, case.memory(line.precision), None, positions, (), silent)


def _timed(piece: Callable[[], None], clock: Clock) -> float:
    """Return the median of a piece's milliseconds, after one that warms."""
    taken = []
    for _ in range(REPEATS + 1):
        begin = clock()
        piece()
        taken.append((clock() - begin) * 1e3)
    return median(taken[1:])
