"""What keeps exits in the checkpoints of a project that knows nothing of them."""

from __future__ import annotations

from typing import Any

import lightning as L
from torch import nn

from lightning_mue.backbones import EXITS


def check_trainer(trainer: L.Trainer) -> None:
    """Refuse what would lose the exits.

    Raises:
        ValueError: a checkpoint of weights alone, or a strategy that shards them.
    """
    if any(getattr(callback, "save_weights_only", False) for callback in trainer.checkpoint_callbacks):
        raise ValueError(
            "A checkpoint with `save_weights_only=True` holds no callback's state, and so no exits; leave that out, or "
            "write them yourself with `lightning_mue.save_exits(model, path)`."
        )
    if trainer.strategy.restore_checkpoint_after_setup:
        raise ValueError(
            "MultiExitSupervision needs whole weights in every process (one device, or DDP), got "
            f"{type(trainer.strategy).__name__}. Where the model fits on one device, train with `strategy='ddp'`; else "
            "call `attach_exits` before you shard it, and add `lightning_mue.exit_losses` to the loss."
        )


def may_be_absent(exits: nn.Module, keys: Any) -> None:
    """Accept weights of the project without exits: their own come from the callback's state."""
    missing = [key for key in keys.missing_keys if EXITS in key.split(".")]
    if len(missing) == len(exits.state_dict()):
        for key in missing:
            keys.missing_keys.remove(key)
