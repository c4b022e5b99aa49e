"""Flickr8k: the official captions and lists, and the table that is handed round without lists."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from typing import Any

from lightning_mue.data.importers.annotations import NAMES, NUMBERED, TABLE, by_kind
from lightning_mue.data.importers.entry import Entry, captioned, key_of
from lightning_mue.data.importers.layout import Layout
from lightning_mue.data.tasks import split_of

NEEDS = (
    "Flickr8k.token.txt or captions.txt (image,caption), with Flickr_8k.{train,dev,test}Images.txt where there is one"
)
SHARES = {"train": 0.75, "val": 0.125, "test": 0.125}
"""Of a split by hash, as the official lists have them."""


def parse(files: Mapping[str, Any], split: str) -> Iterator[Entry]:
    """Yield the pictures of a list; without one, those that a hash of their name gives to the split.

    Raises:
        ValueError: the files are others, or a line is broken.
    """
    found = by_kind(files, [NUMBERED, TABLE, NAMES], NEEDS)
    if (NUMBERED in found) == (TABLE in found):
        raise ValueError(f"{' and '.join(files)}: needed is one file of captions, {NEEDS}")
    captions = _numbered(found[NUMBERED]) if NUMBERED in found else _table(found[TABLE])
    names = [name.strip() for name in found[NAMES]] if NAMES in found else None
    for name in list(captions) if names is None else names:
        key = key_of("flickr8k", name)
        if names is not None or split_of(key, SHARES, "flickr8k") == split:
            yield captioned(key, name, captions.get(name, []))


def note(files: Mapping[str, Any]) -> str:
    """Say so when there is no list."""
    if NAMES in by_kind(files, [NUMBERED, TABLE, NAMES], NEEDS):
        return ""
    shares = ", ".join(f"{share:.1%} {split}" for split, share in SHARES.items())
    return f"there is no list of the split: a hash of the picture's name decides ({shares})"


def _numbered(lines: list[str]) -> dict[str, list[str]]:
    captions: dict[str, list[str]] = {}
    for number, line in enumerate(lines, 1):
        name, tab, caption = line.partition("\t")
        if not tab:
            raise ValueError(f"line {number} of the captions must be NAME.jpg#0, a tab and a caption, got {line!r}")
        captions.setdefault(name.rpartition("#")[0], []).append(caption)
    return captions


def _table(lines: list[str]) -> dict[str, list[str]]:
    captions: dict[str, list[str]] = {}
    for number, row in enumerate(csv.reader(lines), 1):
        if len(row) != 2:
            raise ValueError(f"row {number} of the captions must be a picture and a caption, got {row}")
        if number > 1:
            captions.setdefault(row[0], []).append(row[1])
    return captions


def _files(split: str) -> list[tuple[str, ...]]:
    names = f"Flickr_8k.{'dev' if split == 'val' else split}Images.txt"
    return [("Flickr8k.token.txt", names), ("captions.txt", names), ("Flickr8k.token.txt",), ("captions.txt",)]


LAYOUT = Layout(name="flickr8k", task="caption", texts="captions", files=_files, parse=parse, note=note)
