"""The outcome of real decoding, as calibration sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Decoded:
    """What one policy really produced on a split; the order of samples is free, repeats are dropped.

    Args:
        sample_ids: ``n`` names.
        clusters: ``n`` names of what was drawn independently.
        scores: metric score, ``[n]`` in [0, 1]; for ``consistency`` only reported, NaN where there are no references.
        same: bool ``[n]``, the output equals the full-depth output.
    """

    sample_ids: Sequence[str]
    clusters: Sequence[str]
    scores: np.ndarray
    same: np.ndarray

    def in_order(self) -> Decoded:
        """Return the same in order of sample id, without repeats."""
        ids, index = np.unique(np.asarray(self.sample_ids, dtype=str), return_index=True)
        clusters = [str(self.clusters[i]) for i in index]
        return Decoded(ids.tolist(), clusters, np.asarray(self.scores)[index], np.asarray(self.same)[index])
