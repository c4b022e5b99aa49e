"""Deep supervision: how much each decoder exit counts."""

from __future__ import annotations

from typing import Literal

Weighting = Literal["avg+last", "sum", "linear"]


def exit_weights(kind: Weighting, layers: tuple[int, ...]) -> tuple[float, ...]:
    """Return the loss weight of each exit; ``layers`` are the exits in order, the last layer included.

    ``avg+last``: the mean over exits plus the last layer once more, so that something optimises it alone (DEED).
    ``sum``: plain sum (MuE, section 3.3). ``linear``: ``k / sum of k`` (CALM, section 3.2).

    Raises:
        ValueError: unknown kind.
    """
    count = len(layers)
    if kind == "avg+last":
        return (*[1 / count] * (count - 1), 1 / count + 1)
    if kind == "sum":
        return (1.0,) * count
    if kind == "linear":
        return tuple(k / sum(layers) for k in layers)
    raise ValueError(f"`weighting` must be avg+last, sum or linear, got {kind!r}")
