"""What is fastest here and now: equal ways to compute something, tried in turn on the clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

from torch import Tensor

from lightning_mue.backbones import EncoderStream, StreamState

TRIES = 15


def fastest(ways: Sequence[Callable[[], object]], tries: int = TRIES) -> int:
    """Return which of some ways takes the least time; a first, untimed round warms them up."""
    ms = [list[float]() for _ in ways]
    for _ in range(tries + 1):  # in turn: drift of the machine hits all alike
        for way, of_way in zip(ways, ms, strict=True):
            begin = time.perf_counter()
            way()
            of_way.append(time.perf_counter() - begin)
    times = [median(of_way[1:]) for of_way in ms]
    return times.index(min(times))


class FastestStream:
    """A stream before the decoder, run by the one of its runtimes whose first layer is fastest on the first batch.

    Args:
        rivals: the same stream in each runtime, the backbone's own first.
    """

    def __init__(self, rivals: Sequence[EncoderStream]) -> None:
        own = rivals[0]
        self.name, self.num_layers, self.width = own.name, own.num_layers, own.width
        self.prologue, self.epilogue, self.call = own.prologue, own.epilogue, own.call
        self._rivals, self.chosen = rivals, None if len(rivals) > 1 else own

    def layer(self, k: int, state: StreamState) -> Tensor:
        """Run layer ``k``."""
        if self.chosen is None:
            ways = [lambda rival=rival: rival.layer(k, state) for rival in self._rivals]
            self.chosen = self._rivals[fastest(ways, tries=3)]
        return self.chosen.layer(k, state)
