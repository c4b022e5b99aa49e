"""Training with deep supervision."""

from lightning_mue.training.losses import exit_weights
from lightning_mue.training.module import MultiExitModule

__all__ = ["MultiExitModule", "exit_weights"]
