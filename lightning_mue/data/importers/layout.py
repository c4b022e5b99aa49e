"""What an importer must know of a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_mue.data.importers.entry import Entry

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Layout:
    """An official layout.

    Args:
        name: of the data set.
        task: what its records are for; see ``make_samples``.
        texts: what they are called.
        files: split -> official names of annotation files, as sets of files that belong together.
        parse: (name -> content of the files, split) -> entries; pure.
        options: settings of ``parse`` that change what it gives.
        note: content of the files -> what the user should know of how they were read.
    """

    name: str
    task: str
    texts: str
    files: Callable[[str], list[tuple[str, ...]]]
    parse: Callable[[Mapping[str, Any], str], Iterable[Entry]]
    options: Mapping[str, Any] = field(default_factory=dict)
    note: Callable[[Mapping[str, Any]], str] = lambda files: ""
