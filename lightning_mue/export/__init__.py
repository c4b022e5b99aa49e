"""Bundles: frozen weights, their policy and everything needed to answer, in one folder. Runs without Lightning.

Names load on first use: a bundle of graphs is read without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_mue.export.freezing import freeze
    from lightning_mue.export.loading import load, load_embedder

_HOMES = {"freeze": "freezing", "load": "loading", "load_embedder": "loading"}

__all__ = ["freeze", "load", "load_embedder"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
