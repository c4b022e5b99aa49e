"""The journal: what a calibration has computed, on disk, so that an interrupted one goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning_mue.files import write_text
from lightning_mue.trace import Trace


class Journal:
    """A folder of finished pieces, named by a hash of everything they depend on.

    Args:
        folder: made when first written to.
        key: plain values that all pieces depend on: weights, data, decode settings.
    """

    def __init__(self, folder: str | Path, key: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.key = key

    def path(self, kind: str, parts: Sequence[Any], suffix: str) -> Path:
        """Return where the piece of this kind, made of these plain values, lies."""
        text = json.dumps([self.key, kind, list(parts)], sort_keys=True)
        return self.folder / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:20]}{suffix}"

    def trace(self, kind: str, parts: Sequence[Any], make: Callable[[], Trace]) -> Path:
        """Return the file of one batch's trace, recording it if it is not there or cannot be read."""
        path = self.path(kind, parts, ".safetensors")
        if not (path.exists() and _readable(path)):
            make().save(path)
        return path

    def piece(self, kind: str, parts: Sequence[Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return a finished piece (plain values), making it if it is not there or cannot be read."""
        path = self.path(kind, parts, ".json")
        if path.exists():
            try:
                found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
                return found
            except json.JSONDecodeError:
                pass
        made = make()
        write_text(path, json.dumps(made, sort_keys=True))
        return made


def _readable(path: Path) -> bool:
    try:
        Trace.load(path)
    except ValueError:
        return False
    return True
