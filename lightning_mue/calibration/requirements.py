"""Requirements: every promise, of every group that it is about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lightning_mue.promise import Promise


@dataclass(frozen=True)
class Requirement:
    """One mean loss that has to be within its tolerance.

    Args:
        promise: of which.
        group: of samples; "" for all.
        rows: int, which samples it is about.
    """

    promise: Promise
    group: str
    rows: np.ndarray


def requirements_of(
    promises: Sequence[Promise], groups: Sequence[str] | None, group_of: Sequence[str]
) -> list[Requirement]:
    """Return every promise of every group; of all samples at once if ``groups`` is None.

    Where clusters lie within one group, what is kept in each is kept over all, in whatever shares they come.

    Args:
        promises: at least one.
        groups: names of the groups promised for.
        group_of: the group of each sample.

    Raises:
        ValueError: nothing is promised, or a group has no samples.
    """
    if not promises:
        raise ValueError("Nothing is promised; name at least one promise")
    if groups is None:
        return [Requirement(promise, "", np.arange(len(group_of))) for promise in promises]
    rows = {group: np.flatnonzero(np.asarray(group_of, dtype=str) == group) for group in groups}
    if empty := [group for group, found in rows.items() if not len(found)]:
        raise ValueError(f"Group {empty[0]!r} is promised for and has no samples; there are {sorted(set(group_of))}")
    return [Requirement(promise, group, found) for promise in promises for group, found in rows.items()]
