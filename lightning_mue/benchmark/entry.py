"""One line of a benchmark, measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from lightning_mue.answers import Answers
from lightning_mue.benchmark.lines import Line, Times
from lightning_mue.callbacks.batches import Batch

Ratio = tuple[float, float | None]
"""A median over repeats, and the interquartile range over them."""


@dataclass(frozen=True)
class Entry:
    """What was measured of a line; None where nothing was.

    Args:
        name: of the line.
        quality: mean score of the answers to all test data.
        p50_ms: median milliseconds of a batch, end to end.
        p95_ms: 95th percentile.
        of_generate: time ratio to transformers' ``generate``.
        of_full: time ratio to our own full depth in the same runtime and precision.
        full_gain: times as fast as ``generate``: our own full depth. Kernels and precision, no exits.
        exits_gain: times as fast as our own full depth: this line. Exits alone.
        depths: stream -> mean exit depth.
        histogram: stream -> depth -> share of the samples (decoder: of the tokens) that left there.
        parts: part -> mean milliseconds.
        macs: multiply-adds of one answer.
        note: a few words.
        chosen: whether this is the policy that ships.
    """

    name: str
    quality: float | None = None
    p50_ms: float | None = None
    p95_ms: float | None = None
    of_generate: Ratio | None = None
    of_full: Ratio | None = None
    full_gain: float | None = None
    exits_gain: float | None = None
    depths: Mapping[str, float] = field(default_factory=dict)
    histogram: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    parts: Mapping[str, float] = field(default_factory=dict)
    macs: float | None = None
    note: str = ""
    chosen: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def entry_of(name: str, line: Line, answers: Answers, times: Mapping[str, Times], generate: str, **more: Any) -> Entry:
    """Return a line's entry.

    Args:
        name: of the line.
        line: itself.
        answers: that it gave to all test data.
        times: of all lines.
        generate: name of the line of transformers' ``generate``.
        **more: fields of the entry that are known already.
    """
    this, plain = times[name], times[generate]
    gains: dict[str, Any] = {}
    if line.full is not None:
        full = times[line.full]
        of_full = this.over(full)
        gains = {"of_full": of_full, "full_gain": 1 / full.over(plain)[0], "exits_gain": 1 / of_full[0]}
    quality = answers.quality
    return Entry(
        name,
        quality if np.isfinite(quality) else None,
        this.timing.p50_ms,
        this.timing.p95_ms,
        this.over(plain),
        depths=answers.mean_depths,
        histogram={stream: dict(_shares(depth_N)) for stream, depth_N in answers.depths.items()},
        **gains,
        **more,
    )


def _shares(depth_N: np.ndarray) -> Iterator[tuple[int, float]]:
    depths, counts = np.unique(depth_N, return_counts=True)
    yield from zip(depths.tolist(), (counts / len(depth_N)).tolist(), strict=True)


def mean_parts(line: Line, samples: Sequence[Batch]) -> dict[str, float]:
    """Return part -> mean milliseconds of a sample, measured apart from the whole; nothing for another engine."""
    total: dict[str, float] = {}
    for sample in samples if line.timed is not None else ():
        assert line.timed is not None
        for part, ms in line.timed(sample).timings.items():
            total[part] = total.get(part, 0.0) + ms / len(samples)
    return total
