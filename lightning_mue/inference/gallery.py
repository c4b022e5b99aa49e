"""A gallery: fixed candidates, texts or pictures, among which queries of the other side look for their own.

Because it is fixed, whether one query finds its own does not depend on which others are tested: samples are
independent, and recall is a mean over them. Shapes: ``B`` queries, ``C`` candidates, ``R`` own counterparts of all
queries, ``E`` width of embeddings.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

ROUNDING = 1e-6
"""Cosines of float32 that differ by less are ties: the same vectors, summed in another order, give either."""


class Gallery:
    """Candidates, embedded at full depth.

    Args:
        vectors_CE: unit vectors.
        texts: those of each candidate: a text itself, or what is said of a picture.
    """

    def __init__(self, vectors_CE: Tensor, texts: Sequence[Sequence[str]]) -> None:
        self.vectors_CE, self.texts = vectors_CE, texts
        self._places: dict[str, list[int]] = {}
        for place, of_one in enumerate(texts):
            for text in of_one:
                self._places.setdefault(text, []).append(place)

    @property
    def content(self) -> str:
        """A hash of all that finding depends on."""
        digest = hashlib.sha256(repr([list(of_one) for of_one in self.texts]).encode())
        digest.update(self.vectors_CE.float().cpu().numpy().tobytes())
        return digest.hexdigest()

    def places(self, query_BE: Tensor, own_RE: Tensor, row_R: Tensor, texts: Sequence[Sequence[str]]) -> Tensor:
        """Return how many candidates come before the best of each query's own, int64 ``[B]``: 0 = found first.

        Args:
            query_BE: unit vectors.
            own_RE: those of what the queries should find.
            row_R: whose each is; every query has at least one.
            texts: of each query; a candidate that has one of them counts as its own.
        """
        is_own_BC = torch.zeros(len(texts), len(self.texts), dtype=torch.bool)
        for row, of_one in enumerate(texts):
            is_own_BC[row, [place for text in of_one for place in self._places.get(text, ())]] = True
        return places(query_BE, own_RE, row_R, self.vectors_CE, is_own_BC.to(query_BE.device))


def places(query_BE: Tensor, own_RE: Tensor, row_R: Tensor, candidate_CE: Tensor, is_own_BC: Tensor) -> Tensor:
    """Return how many candidates are no worse than the best of each query's own counterparts, int64 ``[B]``.

    Ties count against a query: a model that tells nothing apart finds nothing.

    Args:
        query_BE: unit vectors of queries.
        own_RE: unit vectors of their own counterparts.
        row_R: whose each is; every query has at least one.
        candidate_CE: unit vectors of candidates.
        is_own_BC: candidates that are one of the query's own.
    """
    query_BE, own_RE = query_BE.float(), own_RE.float()
    own_R = (query_BE[row_R] * own_RE).sum(-1)
    best_B = own_R.new_full((len(query_BE),), -torch.inf).scatter_reduce(0, row_R, own_R, "amax")
    others_BC = (query_BE @ candidate_CE.float().T).masked_fill(is_own_BC, -torch.inf)
    return (others_BC >= best_B[:, None] - ROUNDING).sum(1)
