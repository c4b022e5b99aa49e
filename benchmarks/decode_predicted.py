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
from call_cost import POSITIONS, StepCost, timed_steps
from decode_case import START, Case, Depths
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
        step: of a step.
        together: whether a call takes all blocks of positions, whatever they are; else each is one of its own.
        memory: of the projection of one row's memory, a layer.
    """

    step: StepCost
    together: bool
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
        self.ms += self._prices.step.rest

    def run_layer(self, layer: int, pending: Sequence[Block]) -> None:
        """Pay for the call, or for that of each block, and for the memory of rows that are new here."""
        blocks = [(len(rows), (last - first) * len(rows)) for first, last, rows in pending]
        if self._prices.together:
            blocks = [(sum(rows for rows, _ in blocks), sum(pairs for _, pairs in blocks))]
        self.ms += self._prices.step.layer.of(blocks)
        new = {(layer, row) for _, _, rows in pending for row in rows} - self._projected
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


def alone(case: Case, line: Line) -> Callable[[Depths], float]:
    """Return what predicts a decode of one row."""
    pieces = measure_decoder(_executor(case, line, case.shape.steps), START, case.shape.steps, REPEATS, case.clock)
    table = LatencyTable({}, pieces)
    return lambda depths: float(predicted_ms(table, {"decoder": np.array(depths)})["decoder"].sum())


def together(case: Case, line: Line) -> Callable[[Depths], float]:
    """Return what predicts a decode of a batch."""
    executor = _executor(case, line, max(POSITIONS))
    prices = Prices(
        timed_steps(case, executor, REPEATS), not isinstance(executor, TorchExecutor), _memory_ms(case, line)
    )

    def predict(depths: Depths) -> float:
        priced = Priced(case.shape.layers, prices)
        exits = DecoderExits("static", lambda _step: {}, forced=depths)
        decode(priced, exits, [[START]] * case.batch, (), case.shape.steps)
        return priced.ms

    return predict


def _executor(case: Case, line: Line, positions: int) -> Any:
    assert line.executor_of is not None
    silent = Stopwatch(torch.device("cpu"), False)
    return line.executor_of(case)(None, case.memory(line.precision), None, positions, (), silent)


def _memory_ms(case: Case, line: Line) -> float:
    """Return what the projection of a row's memory takes a layer; it is written where nothing was, as in a decode."""
    taken = []
    for _ in range(REPEATS + 1):
        executor = _executor(case, line, 1)
        begin = case.clock()
        for layer in range(1, case.shape.layers + 1):
            executor.project_memory(layer, range(case.batch))
        taken.append((case.clock() - begin) * 1e3)
    return median(taken[1:]) / case.shape.layers / case.batch
