"""Embedding: a model that embeds a trainer's pictures or texts, as what a calibration runs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from lightning_mue.backbones import view
from lightning_mue.calibration.decoded import Decoded
from lightning_mue.callbacks.batch_keys import BatchKeys
from lightning_mue.callbacks.batches import Batch, content, rows_of
from lightning_mue.callbacks.decoding import Row, check_samples, doing, joined, rows_of_samples
from lightning_mue.callbacks.journal import Journal
from lightning_mue.callbacks.lookup import Lookup, picture_vectors, queries
from lightning_mue.callbacks.ranks import gather
from lightning_mue.callbacks.scoring import processor_of
from lightning_mue.callbacks.search import Proposes, Search
from lightning_mue.callbacks.split_reader import SplitReader
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
        search: what queries look for.
        journal: of finished pieces.
        keys: of the batches.
        lookup: the queries and what they look among; known once the data to propose on has been seen.
    """

    trainer: L.Trainer
    model: nn.Module
    search: Search
    journal: Journal
    keys: BatchKeys
    lookup: Lookup | None = None
    runtime: str = field(default="torch", init=False)
    _readers: dict[str, SplitReader] = field(default_factory=dict, init=False)

    @property
    def settings(self) -> dict[str, Any]:
        """What queries look for and among, and what the model computes in."""
        search, precision = self.search, str(next(self.model.parameters()).dtype).removeprefix("torch.")
        looked: dict[str, Any] = {"query": search.query}
        if search.query == "picture":
            looked |= {"classes": list(search.classes), "template": search.template}
        if search.metric != "top_1":
            looked |= {"candidates": search.candidates, "candidates_seed": search.seed}
        return {**looked, "precision": precision, "batching": "per row", "runtime": self.runtime}

    def engine(self, policy: ExitPolicy) -> EmbedEngine:
        """Return the engine that ships."""
        return EmbedEngine(self.model, policy, check_fingerprint=False, processor=processor_of(self.trainer))

    @property
    def whole(self) -> EmbedEngine:
        """The engine at full depth, with the classes."""
        return self.engine(ExitPolicy(classes=self.search.class_texts))

    def look_among(self, proposes: Proposes) -> Gallery:
        """Draw the candidates and embed them, on all ranks alike; return them.

        Each rank embeds the pictures that it has, so that all have the same vectors.

        Raises:
            ValueError: there are too few, or the data does not give them again.
        """
        whole, drawn = self.whole, self.search.among(proposes)
        if self.search.query == "picture":
            vectors_CE = whole.embed_texts([*drawn]).vectors
        else:
            mine = picture_vectors(whole, self.reader("propose").read("embedding the candidates"), drawn)
            found = dict(gather([*mine.items()]))
            check_samples([*found], drawn)
            device = next(self.model.parameters()).device
            vectors_CE = torch.from_numpy(np.stack([found[name] for name in drawn])).to(device)
        self.lookup = Lookup(self.search, whole, Gallery(vectors_CE, [*drawn.values()]))
        return self.lookup.gallery

    def counted(self, batch: Batch) -> Batch:
        """Return the samples that count: those with a text of their own, in zero-shot classification with a class."""
        return rows_of(batch, [bool(self.search.own(references)) for references in batch["references"]])

    def score(self, batch: Batch, query_BE: Tensor) -> np.ndarray:
        """Return 1 where a query finds its own, else 0: ``[B]``."""
        assert self.lookup is not None
        return (self.lookup.places(batch, query_BE) < self.search.within).double().cpu().numpy()

    def measure(self, one: Batch, repeats: int, precision: str | None) -> LatencyTable:
        """Measure what each piece of embedding a query costs."""
        whole = self.whole
        return measure_embedding(whole, self.search.query, queries(self.search, whole, one), repeats)

    def reader(self, split: str) -> SplitReader:
        """Return what reads a split, one and the same each time."""
        if split not in self._readers:
            wanted = view(self.model).generate_inputs
            self._readers[split] = SplitReader(self.trainer, self.keys, wanted, split, None)
        return self._readers[split]

    def decoder(self, split: str, groups: Sequence[str] | None) -> EmbedDecoder:
        """Return what embeds a split; samples have no groups here."""
        return EmbedDecoder(self, split)

    def is_simulated_exactly(self, policy: ExitPolicy) -> bool:
        """No decoder is recorded here."""
        return False


class EmbedDecoder:
    """Embeds this rank's queries of one split under policies, and gathers all ranks' scores.

    Args:
        subject: whose queries.
        split: ``certify``, or ``propose``: the rest.
    """

    def __init__(self, subject: Embedding, split: str) -> None:
        self._subject, self._split, self.reader = subject, split, subject.reader(split)
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
        engine, journal = self._subject.whole, self._subject.journal
        paths = [
            journal.trace("embeddings", self._made_of(batch), partial(self._record, engine, batch))
            for batch in self._batches(f"recording the exits of {self._subject.search.query}s", ())
        ]
        return sorted(set(gather(paths)))

    def _batches(self, said: str, unchanged: Collection[str]) -> Iterator[Batch]:
        for batch in self.reader.read(said, unchanged):
            counted = self._subject.counted(batch)
            if counted["sample_id"]:
                yield counted

    def _made_of(self, batch: Batch) -> list[Any]:
        assert self._subject.lookup is not None
        return [content(batch), self._subject.lookup.gallery.content]

    def _embed(self, engine: EmbedEngine, batch: Batch) -> dict[str, Any]:
        search = self._subject.search
        vectors_BE = engine.embed(search.query, queries(search, engine, batch)).vectors
        found = self._subject.score(batch, vectors_BE).tolist()
        return {"rows": rows_of_samples(batch, found, {search.metric: found}, {})}

    def _record(self, engine: EmbedEngine, batch: Batch) -> Trace:
        search = self._subject.search
        names = (batch["sample_id"], batch["cluster"], batch["group"])
        meta = {**self._subject.journal.key, "classes": list(search.class_texts)}
        given, score_of = queries(search, engine, batch), partial(self._subject.score, batch)
        return record_embeddings(engine, search.query, given, *names, search.metric, score_of, meta)
