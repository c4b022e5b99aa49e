"""Drafting: how many positions to draft before the last layer settles them, from what steps cost and how drafts fare.

A cycle puts ``k`` positions of a row through the layers below the exit one by one, and through those above together.
If a draft is right with probability ``a``, it settles ``1 + a + ... + a^(k-1)`` tokens. No torch here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from lightning_mue.inference.schedule import Executor

LONGEST = 8
"""Positions of a cycle at most."""

_TRIES = 5
_PRIOR = (4.0, 1.0)
"""Drafts that were right and wrong before any was seen."""
_KEPT = 0.98
"""Weight of what was seen before, after each settling: old requests are forgotten, and drafting is tried again."""


@dataclass(frozen=True)
class StepCost:
    """What positions cost a batch, in ms: ``cost(m) = first + (m - 1) * more``, ``m`` positions of every row together.

    Args:
        layer: first and more, of one layer.
        head: first and more, of the vocabulary head.
    """

    layer: tuple[float, float]
    head: tuple[float, float]

    def cycle(self, k: int, depth: float, num_layers: int) -> float:
        """Return what ``k`` positions cost that are drafted after ``depth`` layers and settled together."""
        layer, head = (first + (k - 1) * more for first, more in (self.layer, self.head))
        return k * depth * self.layer[0] + (k - 1) * self.head[0] + (num_layers - depth) * layer + head


class DraftLength:
    """The length of cycles at which a settled token costs least; it never changes what is chosen.

    Args:
        num_layers: of the decoder.
        depth: its first exit.
        cost: of this batch size on this machine.
    """

    def __init__(self, num_layers: int, depth: int, cost: StepCost) -> None:
        self._num_layers, self._cost = num_layers, cost
        self._right, self._wrong = _PRIOR
        self._depth = float(depth)

    @property
    def acceptance(self) -> float:
        """How likely a draft is right, given that those before it were."""
        return self._right / (self._right + self._wrong)

    def length(self) -> int:
        """Return the number of positions; 1 where drafts do not pay."""
        return min(range(1, LONGEST + 1), key=self._ms_per_token)

    def _ms_per_token(self, k: int) -> float:
        return self._cost.cycle(k, self._depth, self._num_layers) / sum(self.acceptance**i for i in range(k))

    def saw(self, depths: Sequence[int], agreed: int) -> None:
        """Learn that tokens were drafted at these depths, and that the first ``agreed`` of them were right."""
        self._right = _KEPT * self._right + (1 - _KEPT) * _PRIOR[0] + agreed
        self._wrong = _KEPT * self._wrong + (1 - _KEPT) * _PRIOR[1] + (agreed < len(depths))
        for depth in depths:
            self._depth += (1 - _KEPT) * (depth - self._depth)


class DraftLengths:
    """What an engine has learnt of drafts, by size of batch; what steps cost is measured when a size is first seen."""

    def __init__(self) -> None:
        self._known: dict[int, DraftLength] = {}

    def of(self, rows: int, depth: int, positions: int, make: Callable[[], Executor]) -> DraftLength:
        """Return what is known for batches of about this size.

        Args:
            rows: of the batch.
            depth: the decoder's first exit.
            positions: that the executor has room for.
            make: an executor to measure with.
        """
        size = (rows - 1).bit_length()
        if size not in self._known:
            executor = make()
            self._known[size] = DraftLength(executor.num_layers, depth, measure_cost(executor, rows, positions))
        return self._known[size]


def measure_cost(
    executor: Executor, rows: int, positions: int = LONGEST, clock: Callable[[], float] = time.perf_counter
) -> StepCost:
    """Measure steps of a whole batch; layers take turns, so that each one's weights come from where they lie.

    The head ends in numbers, for which even a device that works ahead is waited for; so layers are timed with it.

    Args:
        executor: what it holds is overwritten.
        rows: of the batch.
        positions: that the executor has room for.
        clock: seconds.
    """
    every, last = list(range(rows)), executor.num_layers
    executor.embed(every, 0, [[0] * positions] * rows)

    def layers(m: int) -> None:
        for layer in range(1, last + 1):
            executor.run_layer(layer, [(0, m, every)])

    def head(m: int) -> None:
        executor.choose({last: [(row, position) for row in every for position in range(m)]})

    def both(m: int) -> None:
        layers(m)
        head(m)

    both(positions)  # K/V of the memory are projected now
    ms = [[_ms(piece, m, clock) for piece in (both, head) for m in (1, positions)] for _ in range(_TRIES)]
    both_1, both_m, head_1, head_m = (median(of_piece) for of_piece in zip(*ms, strict=True))
    layer_1, layer_m = (max(0.0, both_ms - head_ms) / last for both_ms, head_ms in ((both_1, head_1), (both_m, head_m)))
    return StepCost(_line(layer_1, layer_m, positions), _line(head_1, head_m, positions))


def _ms(piece: Callable[[int], None], m: int, clock: Callable[[], float]) -> float:
    begin = clock()
    piece(m)
    return (clock() - begin) * 1e3


def _line(first: float, longest: float, positions: int) -> tuple[float, float]:
    return first, max(0.0, longest - first) / (positions - 1) if positions > 1 else 0.0
