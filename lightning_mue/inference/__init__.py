"""Inference under a policy: schedule, executor, engine, traces and the latency table. Runs without Lightning.

Names load on first use: a bundle of graphs needs the schedule and no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_mue.inference.engine import ExitEngine
    from lightning_mue.inference.output import ExitOutput

_HOMES = {"ExitEngine": "engine", "ExitOutput": "output"}

__all__ = ["ExitEngine", "ExitOutput"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
