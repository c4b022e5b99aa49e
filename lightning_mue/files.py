"""Writing files so that no half-written one is ever seen."""

from __future__ import annotations

import os
from pathlib import Path
from secrets import token_hex


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` to ``path`` through a temporary file beside it and a rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{token_hex(8)}")  # process ids repeat on other nodes
    aside.write_bytes(data)
    os.replace(aside, path)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` to ``path`` through a temporary file beside it and a rename."""
    write_bytes(path, text.encode("utf-8"))
