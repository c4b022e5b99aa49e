"""CollectTrace: a validation pass that records every exit of every sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L

from lightning_mue.backbones import fingerprint, view
from lightning_mue.callbacks.batch_keys import BatchKeys, Inputs, Key
from lightning_mue.callbacks.batches import (
    Batch,
    answer_constraint,
    content,
    in_split,
    on_device,
    rows_of,
)
from lightning_mue.callbacks.journal import Journal
from lightning_mue.callbacks.multi_exit_supervision import find_model
from lightning_mue.callbacks.ranks import gather
from lightning_mue.callbacks.scoring import Scoring
from lightning_mue.exits import attached
from lightning_mue.inference.record import record
from lightning_mue.trace import Trace


def open_journal(
    trainer: L.Trainer, model: Any, scoring: Scoring, max_new_tokens: int | None, folder: str | None
) -> Journal:
    """Return the journal of a calibration of this model on the trainer's data."""
    settings = view(model).decode_settings(max_new_tokens)
    datamodule = getattr(trainer, "datamodule", None)
    exits = attached(model)
    key = {
        "fingerprint": fingerprint(model),
        # Exits without adapters and gates have no weights: the fingerprint does not know them.
        "exits": exits.config.to_dict() if exits is not None else None,
        "device": next(model.parameters()).device.type,
        "decode": dict(settings.plain),
        "answers": list(getattr(datamodule, "closed_answers", None) or []),
        "scoring": scoring.key,
        "data": getattr(datamodule, "calibration_fingerprint", "") if trainer.state.fn != "fit" else "select",
    }
    return Journal(folder or Path(trainer.default_root_dir) / "calibration", key)


def record_batch(
    trainer: L.Trainer, model: Any, batch: Batch, scoring: Scoring, max_new_tokens: int | None, journal: Journal
) -> Path | None:
    """Record one batch into the journal; None if it is empty."""
    if not batch["sample_id"]:
        return None
    settings = view(model).decode_settings(max_new_tokens)
    prefix_fn = answer_constraint(trainer, settings.end_ids[0])

    def make() -> Trace:
        return record(
            model,
            on_device(batch, model),
            batch["sample_id"],
            batch["cluster"],
            scoring.of(batch),
            max_new_tokens,
            prefix_fn,
            journal.key,
            batch["group"],
        )

    return journal.trace("trace", [content(batch)], make)


class CollectTrace(L.Callback):
    """Records a trace of the validation data at full depth and leaves it in ``trace`` (and in ``out``).

    Args:
        out: file for the merged trace, or None.
        metric: one of ``promise.METRICS``.
        split: "propose" or "certify" records that part alone; None everything.
        max_new_tokens: of each answer; the generation config's if not given.
        model: attribute of the LightningModule that holds the backbone; if not given, that of MultiExitSupervision in
            the same trainer, else ``model``.
        folder: of the journal; ``<default_root_dir>/calibration`` if not given.
        frequencies: of ``cider``, as in CalibrateExits.
        inputs: where batches hold the backbone's inputs, as in CalibrateExits.
        references: key of the accepted answers, as in CalibrateExits.
        sample_id: key of the samples' names, as in CalibrateExits.
        cluster: key of what was drawn independently, as in CalibrateExits.
    """

    def __init__(
        self,
        out: str | None = None,
        metric: str = "exact_match",
        split: str | None = None,
        max_new_tokens: int | None = None,
        model: str | None = None,
        folder: str | None = None,
        frequencies: str | None = None,
        inputs: Inputs = None,
        references: Key | None = None,
        sample_id: Key | None = None,
        cluster: Key | None = None,
    ) -> None:
        self.out, self.metric, self.split = out, metric, split
        self.max_new_tokens, self.model, self.folder = max_new_tokens, model, folder
        self.frequencies = frequencies
        self.keys = BatchKeys(inputs, references, sample_id, cluster)
        self.trace: Trace | None = None
        self._journal: Journal | None = None
        self._paths: list[Path] = []

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the journal."""
        if not trainer.sanity_checking:
            model = find_model(trainer, pl_module, self.model)
            self._scoring = Scoring(trainer, [self.metric], self.frequencies)
            self._journal = open_journal(trainer, model, self._scoring, self.max_new_tokens, self.folder)
            self._paths = []

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Record the batch."""
        if self._journal is None or trainer.sanity_checking:
            return
        model = find_model(trainer, pl_module, self.model)
        batch = self.keys.read(batch, view(model).generate_inputs)
        if self.split is not None:
            batch = rows_of(batch, in_split(trainer, batch, self.split))
        path = record_batch(trainer, model, batch, self._scoring, self.max_new_tokens, self._journal)
        self._paths += [path] if path is not None else []

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Merge all ranks' traces."""
        if self._journal is None or trainer.sanity_checking:
            return
        self.trace = Trace.merge([Trace.load(p) for p in sorted(set(gather(self._paths)))])
        if self.out is not None and trainer.is_global_zero:
            self.trace.save(self.out)
