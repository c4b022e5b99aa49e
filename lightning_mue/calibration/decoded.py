"""The outcome of real decoding, as calibration sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Decoded:
    """What one policy really produced on a split; the order of samples is free, repeats are dropped.

    Args:
        sample_ids: ``n`` names.
        clusters: ``n`` names of what was drawn independently.
        scores: metric -> score of each sample, ``[n]``; nothing where there are no references.
        same: bool ``[n]``, the output equals the full-depth output.
        groups: ``n`` names of the groups that promises may be about; none if not given.
    """

    sample_ids: Sequence[str]
    clusters: Sequence[str]
    scores: Mapping[str, np.ndarray]
    same: np.ndarray
    groups: Sequence[str] = ()

    def in_order(self) -> Decoded:
        """Return the same in order of sample id, without repeats."""
        ids, index = np.unique(np.asarray(self.sample_ids, dtype=str), return_index=True)
        clusters = [str(self.clusters[i]) for i in index]
        scores = {metric: np.asarray(values)[index] for metric, values in self.scores.items()}
        groups = [str(self.groups[i]) for i in index] if self.groups else []
        return Decoded(ids.tolist(), clusters, scores, np.asarray(self.same)[index], groups)
