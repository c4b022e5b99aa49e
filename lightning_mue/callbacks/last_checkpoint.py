"""LastCheckpoint: ``last.ckpt`` really is the last."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint


class LastCheckpoint(ModelCheckpoint):
    """Keeps ``last.ckpt``: written at every validation and at the end of training, so that ``ckpt_path: last`` goes on.

    Lightning's own ``save_last`` writes it only when the best one changes, and not after the last validation.

    Args:
        dirpath: folder.
    """

    def __init__(self, dirpath: str | None = None) -> None:
        super().__init__(dirpath, filename="last", enable_version_counter=False)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save the very last step here: after it Lightning counts the epoch as over, even in its midst."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.global_step == trainer.max_steps:
            self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the steps since the last validation."""
        self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        if self.dirpath is not None and self._last_global_step_saved != trainer.global_step:
            self._save_checkpoint(trainer, str(Path(self.dirpath) / "last.ckpt"))
