"""Lookup: queries of batches, and what each finds in a gallery.

Shapes: ``B`` samples of a batch, ``C`` candidates, ``R`` own counterparts of all queries, ``E`` width of embeddings.
"""

from __future__ import annotations

from collections.abc import Container, Iterable

import numpy as np
import torch
from torch import Tensor

from lightning_mue.callbacks.batches import Batch, on_device, rows_of
from lightning_mue.callbacks.search import Search
from lightning_mue.inference.embedding import EmbedEngine
from lightning_mue.inference.gallery import Gallery


class Lookup:
    """Queries of batches look for their own.

    Args:
        search: what they look for.
        whole: the engine at full depth, with a processor.
        gallery: what they look among.
    """

    def __init__(self, search: Search, whole: EmbedEngine, gallery: Gallery) -> None:
        self.search, self.whole, self.gallery = search, whole, gallery
        self._own: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}

    def places(self, batch: Batch, query_BE: Tensor) -> Tensor:
        """Return how many candidates come before each query's own, int64 ``[B]``."""
        texts = [self.search.own(references) for references in batch["references"]]
        return self.gallery.places(query_BE, *self._own_of(batch, texts), texts)

    def _own_of(self, batch: Batch, texts: list[list[str]]) -> tuple[Tensor, Tensor]:
        """Return the vectors ``[R, E]`` of what the queries should find, and whose each is, ``[R]``.

        They are kept, for every policy is asked about the same batches.
        """
        if (key := tuple(batch["sample_id"])) not in self._own:
            if self.search.query == "text":
                own_RE = self.whole.images(on_device(batch, self.whole.model)["pixel_values"]).vectors
                rows = list(range(len(key)))
            else:
                distinct = sorted({text for of_one in texts for text in of_one})
                found = dict(zip(distinct, self.whole.embed_texts(distinct).vectors, strict=True))
                own_RE = torch.stack([found[text] for of_one in texts for text in of_one])
                rows = [row for row, of_one in enumerate(texts) for _ in of_one]
            self._own[key] = own_RE, torch.tensor(rows, device=own_RE.device)
        return self._own[key]


def queries(search: Search, engine: EmbedEngine, batch: Batch) -> Tensor:
    """Return what the queries' tower reads of a batch: pictures ``[B, 3, H, W]`` or whole texts."""
    if search.query == "picture":
        pixel_values: Tensor = on_device(batch, engine.model)["pixel_values"]
        return pixel_values
    return engine.text_ids([search.own(references)[0] for references in batch["references"]])


def picture_vectors(whole: EmbedEngine, batches: Iterable[Batch], names: Container[str]) -> dict[str, np.ndarray]:
    """Return sample -> its picture's vector ``[E]``, of the samples of these names."""
    found: dict[str, np.ndarray] = {}
    for batch in batches:
        rows = rows_of(batch, [name in names for name in batch["sample_id"]])
        if rows["sample_id"]:
            vectors_BE = whole.images(on_device(rows, whole.model)["pixel_values"]).vectors.float().cpu().numpy()
            found |= dict(zip(rows["sample_id"], vectors_BE, strict=True))
    return found
