"""Training with deep supervision."""

from lightning_mue.training.losses import exit_weights
from lightning_mue.training.module import MultiExitModule
from lightning_mue.training.supervision import Supervision

__all__ = ["MultiExitModule", "Supervision", "exit_weights"]
