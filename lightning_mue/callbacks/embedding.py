"""Embedding: a model that embeds a trainer's pictures, as what a calibration runs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from torch import Tensor, nn

from lightning_mue.backbones import view
from lightning_mue.calibration.decoded import Decoded
from lightning_mue.callbacks.batch_keys import BatchKeys
from lightning_mue.callbacks.batches import Batch, content, on_device, rows_of
from lightning_mue.callbacks.decoding import Row, doing, joined, rows_of_samples
from lightning_mue.callbacks.journal import Journal
from lightning_mue.callbacks.ranks import gather
from lightning_mue.callbacks.scoring import processor_of
from lightning_mue.callbacks.split_reader import SplitReader
from lightning_mue.callbacks.text_search import TextSearch
from lightning_mue.inference.embed_profile import measure_embedding
from lightning_mue.inference.embed_record import record_embeddings
from lightning_mue.inference.embedding import EmbedEngine
from lightning_mue.inference.gallery import Gallery
from lightning_mue.latency import LatencyTable
from lightning_mue.policy import ExitPolicy
from lightning_mue.trace import Trace


@dataclass
class Embedding:
    """A model that embeds; a `Subject`.

    Args:
        trainer: whose data, and whose data module or module has the ``processor`` of texts.
        model: the backbone.
        search: what pictures look for.
        journal: of finished pieces.
        keys: of the batches.
        gallery: what they look among; known once the data to propose on has been seen.
    """

    trainer: L.Trainer
    model: nn.Module
    search: TextSearch
    journal: Journal
    keys: BatchKeys
    gallery: Gallery | None = None
    runtime: str = field(default="torch", init=False)

    @property
    def settings(self) -> dict[str, Any]:
        """What pictures look for and among, and what the model computes in."""
        precision = str(next(self.model.parameters()).dtype).removeprefix("torch.")
        texts: dict[str, Any] = {"classes": list(self.search.classes), "template": self.search.template}
        if self.search.metric != "top_1":
            texts |= {"candidates": self.search.candidates, "candidates_seed": self.search.seed}
        return {**texts, "precision": precision, "batching": "per row", "runtime": self.runtime}

    def engine(self, policy: ExitPolicy) -> EmbedEngine:
        """Return the engine that ships."""
        return EmbedEngine(self.model, policy, check_fingerprint=False, processor=processor_of(self.trainer))

    @property
    def full_depth(self) -> EmbedEngine:
        """The engine at full depth, with the classes."""
        return self.engine(ExitPolicy(classes=self.search.class_texts))

    def counted(self, batch: Batch) -> Batch:
        """Return the samples that count; all do in retrieval, those of a class in zero-shot classification."""
        return rows_of(batch, [bool(self.search.own(references)) for references in batch["references"]])

    def score(self, batch: Batch, image_BE: Tensor) -> np.ndarray:
        """Return 1 where a picture finds a text of its own, else 0: ``[B]``."""
        assert self.gallery is not None
        place_B = self.gallery.places(image_BE, [self.search.own(references) for references in batch["references"]])
        return (place_B < self.search.within).double().cpu().numpy()

    def measure(self, one: Batch, repeats: int, precision: str | None) -> LatencyTable:
        """Measure what each piece of embedding a picture costs."""
        return measure_embedding(self.full_depth, on_device(one, self.model)["pixel_values"], repeats)

    def decoder(self, split: str, groups: Sequence[str] | None) -> EmbedDecoder:
        """Return what embeds a split."""
        return EmbedDecoder(self, split, groups)

    def is_simulated_exactly(self, policy: ExitPolicy) -> bool:
        """No decoder is recorded here."""
        return False


class EmbedDecoder:
    """Embeds this rank's pictures of one split under policies, and gathers all ranks' scores.

    Args:
        subject: whose pictures.
        split: ``certify``, or ``propose``: the rest.
        groups: only samples of these; None: all.
    """

    def __init__(self, subject: Embedding, split: str, groups: Sequence[str] | None) -> None:
        self._subject, self._split = subject, split
        wanted = view(subject.model).generate_inputs
        self._reader = SplitReader(subject.trainer, subject.keys, wanted, split, groups)
        self._full = dict[str, Row]()

    def __call__(self, policy: ExitPolicy, unchanged: Collection[str] = ()) -> Decoded:
        """Embed the split under ``policy``; full depth must come first."""
        engine, journal = self._subject.engine(policy), self._subject.journal
        mine: list[dict[str, Any]] = []
        for batch in self._batches(doing(self._split, policy), unchanged):
            parts = [policy.to_json(), *self._made_of(batch)]
            mine.append(journal.piece("embedded", parts, partial(self._embed, engine, batch)))
        rows = [row for piece in gather(mine) for row in piece["rows"]]
        if policy.is_full_depth:
            self._full = {row["id"]: row for row in rows}
        return joined([*rows, *(self._full[name] for name in unchanged)], self._full)

    def signals(self) -> list[Path]:
        """Record the exits on the split; return the files of all ranks."""
        engine, journal = self._subject.full_depth, self._subject.journal
        paths = [
            journal.trace("embeddings", self._made_of(batch), partial(self._record, engine, batch))
            for batch in self._batches("recording the exits of pictures", ())
        ]
        return sorted(set(gather(paths)))

    def _batches(self, said: str, unchanged: Collection[str]) -> Iterator[Batch]:
        for batch in self._reader.read(said, unchanged):
            counted = self._subject.counted(batch)
            if counted["sample_id"]:
                yield counted

    def _made_of(self, batch: Batch) -> list[Any]:
        assert self._subject.gallery is not None
        return [content(batch), list(self._subject.gallery.texts)]

    def _embed(self, engine: EmbedEngine, batch: Batch) -> dict[str, Any]:
        vectors_BE = engine.images(on_device(batch, self._subject.model)["pixel_values"]).vectors
        found = self._subject.score(batch, vectors_BE).tolist()
        return {"rows": rows_of_samples(batch, found, {self._subject.search.metric: found}, {})}

    def _record(self, engine: EmbedEngine, batch: Batch) -> Trace:
        names = (batch["sample_id"], batch["cluster"], batch["group"])
        meta = {**self._subject.journal.key, "classes": list(self._subject.search.class_texts)}
        pixel_values = on_device(batch, self._subject.model)["pixel_values"]
        score_of = partial(self._subject.score, batch)
        return record_embeddings(engine, pixel_values, *names, self._subject.search.metric, score_of, meta)
