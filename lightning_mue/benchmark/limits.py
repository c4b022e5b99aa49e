"""The least time that answers can take: weights read and multiplied with, as fast as this machine can. Arithmetic.

What is left out (norms, activations, adapters, the K/V of the answer itself) makes it lower, never higher.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

BYTES = {"float32": (4, 4), "bfloat16": (2, 2), "float16": (2, 2), "int8": (1, 2), "int8_rows": (1, 2)}
"""Precision -> bytes of a weight and of a number in K/V: beside 8-bit matrices K/V are kept in 16."""

HEAD = "int8"
"""The screened head, exact in every precision, reads weights of 8 bits."""

Depths = Sequence[Sequence[int]]
"""Row -> exit depth of each token."""

Runs = Mapping[str, Sequence["Work"]]
"""Part (a stream, ``layers`` and ``memory`` of the decoder, ``head``) -> what it runs."""


@dataclass(frozen=True)
class Work:
    """What one run of a piece takes.

    Args:
        weights: numbers in the matrices that it reads, however much goes through them.
        macs: multiply-adds.
        cached: numbers in the K/V of the memory that it reads.
    """

    weights: int
    macs: int
    cached: int = 0


@dataclass(frozen=True)
class StreamWork:
    """A stream left once per sample.

    Args:
        fixed: prologue and epilogue, of all rows together.
        layers: each layer, of all rows together.
    """

    fixed: Work
    layers: Sequence[Work]


@dataclass(frozen=True)
class DecoderWork:
    """A decoder.

    Args:
        layers: each layer, of one position of one row.
        memory: each layer's projection of the memory of one row.
        head: of one row.
    """

    layers: Sequence[Work]
    memory: Sequence[Work]
    head: Work


@dataclass(frozen=True)
class Machine:
    """What a machine does at its best.

    Args:
        precision: one of ``BYTES``.
        bytes_per_s: read of a buffer as large as the weights, again and again.
        macs_per_s: of large matrices.
    """

    precision: str
    bytes_per_s: float
    macs_per_s: float

    def seconds(self, work: Work) -> float:
        """Return the least time of one run: reading and multiplying overlap, so the longer of the two."""
        of_weight, of_cached = BYTES[self.precision]
        read = work.weights * of_weight + work.cached * of_cached
        return max(read / self.bytes_per_s, work.macs / self.macs_per_s)


def least_seconds(runs: Runs, machine: Machine, head: Machine) -> dict[str, float]:
    """Return part -> the least time of its runs, which follow each other.

    Args:
        runs: of all parts.
        machine: in the precision of the layers.
        head: the same machine in the precision of the ``HEAD``.
    """
    return {
        part: sum((head if part == "head" else machine).seconds(run) for run in of_part)
        for part, of_part in runs.items()
    }


def macs(runs: Runs) -> int:
    """Return the multiply-adds of all runs."""
    return sum(run.macs for of_part in runs.values() for run in of_part)


def stream_runs(stream: StreamWork, depths: Sequence[int]) -> list[Work]:
    """Return what a stream runs whose rows leave at these depths."""
    runs = [stream.fixed]
    for k, layer in enumerate(stream.layers, 1):
        if rows := sum(depth >= k for depth in depths):
            runs.append(Work(layer.weights, layer.macs * rows // len(depths)))
    return runs


def decoder_runs(decoder: DecoderWork, depths: Depths, prompts: Sequence[int] | None = None) -> Runs:
    """Return what a decoder runs whose tokens leave at these depths, with K/V caught up just in time.

    Args:
        decoder: what its pieces take.
        depths: of each row's tokens.
        prompts: row -> tokens of its decoder prompt; none if not given.
    """
    layers = []
    for layer, rows, positions in layer_calls(depths, prompts):
        one = decoder.layers[layer - 1]
        layers.append(Work(one.weights, one.macs * positions, one.cached * rows))
    deepest = [max(of_row, default=0) for of_row in depths]
    reached = [sum(depth >= k for depth in deepest) for k in range(1, len(decoder.memory) + 1)]
    memory = [Work(one.weights, one.macs * rows) for one, rows in zip(decoder.memory, reached, strict=True) if rows]
    live = [sum(t < len(of_row) for of_row in depths) for t in range(max(map(len, depths), default=0))]
    head = [Work(decoder.head.weights, decoder.head.macs * rows) for rows in live]
    return {"layers": layers, "memory": memory, "head": head}


def layer_calls(depths: Depths, prompts: Sequence[int] | None = None) -> Iterator[tuple[int, int, int]]:
    """Yield layer, rows and positions of every run of a decoder's layer; positions missing there are caught up."""
    before = [0] * len(depths) if prompts is None else prompts
    frontier: dict[tuple[int, int], int] = {}
    for t in range(max(map(len, depths), default=0)):
        at = {row: of_row[t] for row, of_row in enumerate(depths) if t < len(of_row)}
        for layer in range(1, max(at.values()) + 1):
            rows = [row for row, depth in at.items() if depth >= layer]
            positions = sum(before[row] + t + 1 - frontier.get((row, layer), 0) for row in rows)
            yield layer, len(rows), positions
            frontier |= {(row, layer): before[row] + t + 1 for row in rows}


def answer_runs(
    streams: Mapping[str, StreamWork],
    decoder: DecoderWork,
    stream_depths: Mapping[str, Sequence[int]],
    depths: Depths,
    prompts: Sequence[int] | None = None,
) -> Runs:
    """Return what a whole answer runs, of all rows of a batch together."""
    before = {name: stream_runs(stream, stream_depths[name]) for name, stream in streams.items()}
    return {**before, **decoder_runs(decoder, depths, prompts)}
