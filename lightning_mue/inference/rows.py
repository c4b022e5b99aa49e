"""Some rows of a batch, answered apart from the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning_mue.inference.answers import ClosedAnswers
from lightning_mue.policy import ExitPolicy

PrefixFn = Callable[[int, Any], list[int]]
"""transformers' ``prefix_allowed_tokens_fn``: row, tokens so far (tensor or array) -> tokens that may come next."""


def rows_of(inputs: Mapping[str, Any], names: Sequence[str], rows: list[int]) -> dict[str, Any]:
    """Return these rows of the inputs that have these names."""
    return {name: inputs[name][rows] for name in names if inputs.get(name) is not None}


def groups_of(policy: ExitPolicy, batch: Mapping[str, Any]) -> list[str] | None:
    """Return the group of each row, under the key that the certificate names; None if the policy is of no groups."""
    if policy.groups is None or policy.certificate is None:
        return None
    return [str(group) for group in batch[policy.certificate.decode["group_by"]]]


def asked_once(prefix_fn: PrefixFn) -> PrefixFn:
    """Return the constraint, asked once in a step of a row, however often a head wants to know."""
    last: dict[tuple[int, int], tuple[list[int], list[int]]] = {}

    def allowed(row: int, ids: Any) -> list[int]:
        known, step = ids.tolist(), (row, len(ids))
        if step not in last or last[step][0] != known:
            last[step] = known, prefix_fn(row, ids)
        return last[step][1]

    return allowed


def of_beams(prefix_fn: PrefixFn | None, beams: int) -> PrefixFn | None:
    """Return the constraint of samples as that of their beams, which are rows one after the other."""
    return prefix_fn and (lambda row, ids: prefix_fn(row // beams, ids))


def constraint_of(prefix_fn: PrefixFn | None, rows: list[int]) -> PrefixFn | None:
    """Return the constraint of the whole batch as that of some of its rows."""
    if isinstance(prefix_fn, ClosedAnswers):
        return prefix_fn  # it is of all rows alike
    return prefix_fn and (lambda row, ids: prefix_fn(rows[row], ids))
