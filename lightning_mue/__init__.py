"""Dynamic early exit for vision-language models, as a PyTorch Lightning plug-in.

Names load on first use, so that reading a policy needs no torch and a bundle needs no Lightning.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_mue.backbones import register_view
    from lightning_mue.calibration.watch import Watch
    from lightning_mue.callbacks import (
        CalibrateEmbeddings,
        CalibrateExits,
        CollectTrace,
        LogExitDepth,
        MultiExitSupervision,
    )
    from lightning_mue.certificate import Certificate
    from lightning_mue.data import ShardsDataModule
    from lightning_mue.exits import ExitConfig, attach_exits, detach_exits, load_exits, save_exits
    from lightning_mue.exits.pretrained import from_pretrained
    from lightning_mue.export import freeze, load, load_embedder
    from lightning_mue.inference import ExitEngine
    from lightning_mue.inference.embedding import EmbedEngine
    from lightning_mue.inference.watched import WatchedEngine
    from lightning_mue.latency import LatencyTable
    from lightning_mue.policy import ExitPolicy, ExitRule
    from lightning_mue.promise import Promise
    from lightning_mue.surface import disable, early_exit, enable
    from lightning_mue.trace import Trace
    from lightning_mue.training import MultiExitModule
    from lightning_mue.training.exit_losses import exit_losses

__version__ = "0.1.0"

_HOMES = {
    "CalibrateEmbeddings": "callbacks",
    "CalibrateExits": "callbacks",
    "Certificate": "certificate",
    "CollectTrace": "callbacks",
    "EmbedEngine": "inference.embedding",
    "ExitConfig": "exits",
    "ExitEngine": "inference",
    "ExitPolicy": "policy",
    "ExitRule": "policy",
    "LatencyTable": "latency",
    "LogExitDepth": "callbacks",
    "MultiExitModule": "training",
    "MultiExitSupervision": "callbacks",
    "Promise": "promise",
    "ShardsDataModule": "data",
    "Trace": "trace",
    "Watch": "calibration.watch",
    "WatchedEngine": "inference.watched",
    "attach_exits": "exits",
    "disable": "surface",
    "early_exit": "surface",
    "enable": "surface",
    "exit_losses": "training.exit_losses",
    "detach_exits": "exits",
    "freeze": "export",
    "from_pretrained": "exits.pretrained",
    "load": "export",
    "load_embedder": "export",
    "load_exits": "exits",
    "register_view": "backbones",
    "save_exits": "exits",
}

__all__ = [
    "CalibrateEmbeddings",
    "CalibrateExits",
    "Certificate",
    "CollectTrace",
    "EmbedEngine",
    "ExitConfig",
    "ExitEngine",
    "ExitPolicy",
    "ExitRule",
    "LatencyTable",
    "LogExitDepth",
    "MultiExitModule",
    "MultiExitSupervision",
    "Promise",
    "ShardsDataModule",
    "Trace",
    "Watch",
    "WatchedEngine",
    "attach_exits",
    "detach_exits",
    "disable",
    "early_exit",
    "enable",
    "exit_losses",
    "freeze",
    "from_pretrained",
    "load",
    "load_embedder",
    "load_exits",
    "register_view",
    "save_exits",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
