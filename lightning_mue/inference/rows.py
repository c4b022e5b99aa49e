"""Some rows of a batch, answered apart from the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

PrefixFn = Callable[[int, Tensor], list[int]]
"""transformers' ``prefix_allowed_tokens_fn``: row, tokens so far -> tokens that may come next."""


def rows_of(inputs: Mapping[str, Any], names: Sequence[str], rows: list[int]) -> dict[str, Any]:
    """Return these rows of the inputs that have these names."""
    return {name: inputs[name][rows] for name in names if inputs.get(name) is not None}


def constraint_of(prefix_fn: PrefixFn | None, rows: list[int]) -> PrefixFn | None:
    """Return the constraint of the whole batch as that of some of its rows."""
    return prefix_fn and (lambda row, ids: prefix_fn(rows[row], ids))
