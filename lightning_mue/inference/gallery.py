"""A gallery: fixed texts among which pictures look for their own.

Because it is fixed, whether one picture finds its text does not depend on which other pictures are tested: samples are
independent, and recall is a mean over them. Shapes: ``B`` pictures, ``C`` candidates, ``R`` own texts of all pictures,
``E`` width of embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_mue.inference.embedding import EmbedEngine

ROUNDING = 1e-6
"""Cosines of float32 that differ by less are ties: the same vectors, summed in another order, give either."""


class Gallery:
    """Candidates, embedded once at full depth.

    Args:
        engine: embeds texts; with a processor.
        texts: the candidates, distinct.
    """

    def __init__(self, engine: EmbedEngine, texts: Sequence[str]) -> None:
        self.texts, self._engine = tuple(texts), engine
        self._place = {text: place for place, text in enumerate(self.texts)}
        self._vectors_CE = engine.full_depth_texts(self.texts)
        self._own: dict[tuple[tuple[str, ...], ...], Tensor] = {}

    def places(self, image_BE: Tensor, own: Sequence[Sequence[str]]) -> Tensor:
        """Return how many candidates come before the best of each picture's own texts, int64 ``[B]``: 0 = found first.

        Args:
            image_BE: unit vectors of pictures.
            own: texts of each picture, at least one; where a candidate is one of them, it counts as its own.
        """
        row_R = torch.tensor([row for row, texts in enumerate(own) for _ in texts], device=image_BE.device)
        is_own_BC = torch.zeros(len(own), len(self.texts), dtype=torch.bool)
        for row, texts in enumerate(own):
            is_own_BC[row, [self._place[text] for text in texts if text in self._place]] = True
        return places(image_BE, self._own_vectors(own), row_R, self._vectors_CE, is_own_BC.to(image_BE.device))

    def _own_vectors(self, own: Sequence[Sequence[str]]) -> Tensor:
        """Return the own texts' vectors ``[R, E]``; kept, for every policy is asked about the same batches."""
        key = tuple(map(tuple, own))
        if key not in self._own:
            distinct = sorted({text for texts in own for text in texts})
            found = dict(zip(distinct, self._engine.full_depth_texts(distinct), strict=True))
            self._own[key] = torch.stack([found[text] for texts in own for text in texts])
        return self._own[key]


def places(image_BE: Tensor, own_RE: Tensor, row_R: Tensor, candidate_CE: Tensor, is_own_BC: Tensor) -> Tensor:
    """Return how many candidates are no worse than the best of each picture's own texts, int64 ``[B]``.

    Ties count against a picture: a model that tells nothing apart finds nothing.

    Args:
        image_BE: unit vectors of pictures.
        own_RE: unit vectors of their own texts.
        row_R: whose each is; every picture has at least one.
        candidate_CE: unit vectors of candidates.
        is_own_BC: candidates that are one of the picture's own texts.
    """
    image_BE, own_RE = image_BE.float(), own_RE.float()
    own_R = (image_BE[row_R] * own_RE).sum(-1)
    best_B = own_R.new_full((len(image_BE),), -torch.inf).scatter_reduce(0, row_R, own_R, "amax")
    others_BC = (image_BE @ candidate_CE.float().T).masked_fill(is_own_BC, -torch.inf)
    return (others_BC >= best_B[:, None] - ROUNDING).sum(1)
