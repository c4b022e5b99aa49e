"""WritePredictions: what ``predict`` found, on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from lightning_mue.callbacks.ranks import gather
from lightning_mue.files import write_text


class WritePredictions(L.Callback):
    """Writes what ``predict`` found to ``predictions.jsonl`` in ``trainer.default_root_dir``, in order of sample id."""

    def __init__(self) -> None:
        self._rows: dict[str, dict[str, Any]] = {}

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the rows; a sample that came twice counts once."""
        self._rows |= {row["sample_id"]: row for row in outputs}

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the rows of all ranks."""
        rows = dict(gather(list(self._rows.items())))
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / "predictions.jsonl"
            write_text(path, "".join(json.dumps(rows[name]) + "\n" for name in sorted(rows)))
            rank_zero_info(f"{len(rows)} predictions -> {path}")
