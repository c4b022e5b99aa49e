"""Reading one split of a trainer's validation data again: the batches that the validation loop saw."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from typing import Any

import lightning as L
from rich.progress import track
from torch import Tensor

from lightning_mue.callbacks.batch_keys import BatchKeys
from lightning_mue.callbacks.batches import Batch, in_split, prepared, rows_of

MEMORY = 512 * 2**20
"""Bytes of tensors that a rank keeps of a split for the next pass: a calibration makes dozens."""


class SplitReader:
    """This rank's batches of one split, under our own names; read once, if they fit into ``MEMORY``.

    Args:
        trainer: whose validation data is read.
        keys: of the batches.
        wanted: names of the backbone's inputs.
        split: ``certify``, or ``propose``: the rest.
        groups: only samples of these are given; None: all.
    """

    def __init__(
        self, trainer: L.Trainer, keys: BatchKeys, wanted: Sequence[str], split: str, groups: Container[str] | None
    ) -> None:
        self._trainer, self._keys, self._wanted = trainer, keys, wanted
        self._split, self._groups = split, groups
        self._kept: list[Batch] | None = None
        self._fits = True

    def forget(self) -> None:
        """Let go of what is kept; the next pass reads again."""
        self._kept = None

    def read(self, doing: str, without: Collection[str] = ()) -> Iterator[Batch]:
        """Give the batches of the split, less the samples that are named; ``doing`` is said beside the progress."""
        shown = self._trainer.is_global_zero and self._trainer.progress_bar_callback is not None
        known, kept = set(without), self._kept
        total = sum(self._trainer.num_val_batches) if kept is None else len(kept)
        # No thread may draw it: loaders fork their workers inside, and a fork copies locks that a thread holds.
        how: dict[str, Any] = {"total": total, "auto_refresh": False, "disable": not shown}
        for batch in track(self._of_split() if kept is None else kept, doing, **how):
            wanted = [name not in known for name in batch["sample_id"]]
            if any(wanted):
                yield rows_of(batch, wanted)

    def _of_split(self) -> Iterator[Batch]:
        """Give the split's rows of each batch, be it none; keep them for the next time."""
        kept, size = list[Batch](), 0
        for batch in self._batches():
            batch = self._keys.read(batch, self._wanted)
            certifies = in_split(self._trainer, batch, "certify")
            asked = [self._groups is None or group in self._groups for group in batch["group"]]
            of_split = [c == (self._split == "certify") and a for c, a in zip(certifies, asked, strict=True)]
            batch = rows_of(batch, of_split)
            if self._fits:
                kept.append({k: v.cpu() if isinstance(v, Tensor) else v for k, v in batch.items()})
                size += sum(value.nbytes for value in batch.values() if isinstance(value, Tensor))
                self._fits = size <= MEMORY
                kept = kept if self._fits else []
            yield batch
        self._kept = kept if self._fits else None

    def _batches(self) -> Iterator[Any]:
        """Give the batches that the validation loop saw: of all loaders, as many as ``limit_val_batches`` says."""
        loaders: Any = self._trainer.val_dataloaders
        loaders = list(loaders.values()) if isinstance(loaders, Mapping) else loaders
        loaders = loaders if isinstance(loaders, (list, tuple)) else [loaders]
        for i, (loader, limit) in enumerate(zip(loaders, self._trainer.num_val_batches, strict=True)):
            for batch in itertools.islice(loader, None if limit == math.inf else int(limit)):
                yield prepared(self._trainer, batch, i)
