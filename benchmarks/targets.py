"""``targets.json``: every promised figure, written by the script that measured it."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

from lightning_mue.files import write_text

TARGETS = Path(__file__).parent / "targets.json"


def note(name: str, value: float, target: float, better: str, unit: str, command: str, device: str) -> None:
    """Write one figure; the others stay as they are.

    Args:
        name: of the figure.
        value: as measured.
        target: what was promised.
        better: ``higher`` or ``lower``.
        unit: of both.
        command: that measures it again.
        device: it was measured on.
    """
    entry = {
        "value": round(value, 4),
        "target": target,
        "better": better,
        "unit": unit,
        "command": command,
        "device": device,
        "date": today(),
    }
    targets: dict[str, Any] = json.loads(TARGETS.read_text()) if TARGETS.exists() else {}
    write_text(TARGETS, json.dumps(targets | {name: entry}, indent=1, sort_keys=True) + "\n")


def today() -> str:
    """Return the date, ISO."""
    return datetime.datetime.now(tz=datetime.UTC).date().isoformat()


def device() -> str:
    """Return the processor's name and the number of its cores, without the name of the host."""
    import os

    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
    return f"{names[0] if names else 'CPU'}, {os.cpu_count()} cores"
