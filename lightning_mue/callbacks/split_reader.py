"""Reading one split of a trainer's validation data again: the batches that the validation loop saw."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from typing import Any

import lightning as L
from rich.progress import track

from lightning_mue.callbacks.batch_keys import BatchKeys
from lightning_mue.callbacks.batches import Batch, in_split, prepared, rows_of


class SplitReader:
    """This rank's batches of one split, under our own names.

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

    def read(self, doing: str, without: Collection[str] = ()) -> Iterator[Batch]:
        """Give the batches of the split, less the samples that are named; ``doing`` is said beside the progress."""
        shown = self._trainer.is_global_zero and self._trainer.progress_bar_callback is not None
        total, known = sum(self._trainer.num_val_batches), set(without)
        # No thread may draw it: loaders fork their workers inside, and a fork copies locks that a thread holds.
        batches = track(self._batches(), doing, total, auto_refresh=False, disable=not shown)
        for batch in batches:
            batch = self._keys.read(batch, self._wanted)
            certifies = in_split(self._trainer, batch, "certify")
            wanted = [
                c == (self._split == "certify")
                and (self._groups is None or group in self._groups)
                and name not in known
                for c, group, name in zip(certifies, batch["group"], batch["sample_id"], strict=True)
            ]
            if any(wanted):
                yield rows_of(batch, wanted)

    def _batches(self) -> Iterator[Any]:
        """Give the batches that the validation loop saw: of all loaders, as many as ``limit_val_batches`` says."""
        loaders: Any = self._trainer.val_dataloaders
        loaders = list(loaders.values()) if isinstance(loaders, Mapping) else loaders
        loaders = loaders if isinstance(loaders, (list, tuple)) else [loaders]
        for i, (loader, limit) in enumerate(zip(loaders, self._trainer.num_val_batches, strict=True)):
            for batch in itertools.islice(loader, None if limit == math.inf else int(limit)):
                yield prepared(self._trainer, batch, i)
