"""The model that a LightningModule holds, and its exits."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lightning_mue.backbones import unwrapped
from lightning_mue.exits import Exits, attached


def held_model(pl_module: L.LightningModule, path: str) -> Any:
    """Return the module at an attribute path, made by ``configure_model`` if it is not there yet.

    Raises:
        ValueError: there is none.
    """
    found = _submodule(pl_module, path)
    if found is None and is_overridden("configure_model", pl_module):
        pl_module.configure_model()
        found = _submodule(pl_module, path)
    if found is None:
        raise ValueError(
            f"`model` must name a module that {type(pl_module).__name__} makes in `__init__` or `configure_model`; it "
            f"has {[name for name, _ in pl_module.named_children()]}, got {path!r}."
        )
    return unwrapped(found)


def held_exits(pl_module: L.LightningModule, path: str) -> Exits:
    """Return the exits of the model at an attribute path.

    Raises:
        ValueError: it has none any more.
    """
    exits = attached(held_model(pl_module, path))
    if exits is None:
        raise ValueError(
            f"Exits were attached to `{path}`, and {type(pl_module).__name__} now holds a model without them. "
            "`configure_model` is called more than once, as Lightning documents, and must make it once: "
            f"`if self.{path} is None`."
        )
    return exits


def _submodule(pl_module: L.LightningModule, path: str) -> nn.Module | None:
    try:
        return pl_module.get_submodule(path)
    except AttributeError:
        return None
