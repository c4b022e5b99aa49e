"""The outcome of real decoding, as calibration sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lightning_mue.promise import Promise


@dataclass(frozen=True)
class Decoded:
    """What one policy really produced on a split; the order of samples is free, repeats are dropped.

    Args:
        sample_ids: ``n`` names.
        clusters: ``n`` names of what was drawn independently.
        scores: metric -> score of each sample, ``[n]``; nothing where there are no references.
        same: bool ``[n]``, the output equals the full-depth output.
        groups: ``n`` names of the groups that promises may be about; none if not given.
        counts: metric of a corpus -> what it is computed from, of each sample, ``[n, K]``.
    """

    sample_ids: Sequence[str]
    clusters: Sequence[str]
    scores: Mapping[str, np.ndarray]
    same: np.ndarray
    groups: Sequence[str] = ()
    counts: Mapping[str, np.ndarray] = field(default_factory=dict)

    def values(self, promise: Promise) -> np.ndarray:
        """Return what a test of the promise reads of each sample: its score, ``[n]``, or counts, ``[n, K]``."""
        if promise.metric == "consistency":
            return np.asarray(self.same, np.float64)  # of full depth: 1, its outputs are its own
        if promise.approximate:
            return self.counts[promise.metric]
        return np.minimum(self.scores[promise.metric], promise.highest)

    def in_order(self) -> Decoded:
        """Return the same in order of sample id, without repeats."""
        ids, index = np.unique(np.asarray(self.sample_ids, dtype=str), return_index=True)
        clusters = [str(self.clusters[i]) for i in index]
        scores = {metric: np.asarray(values)[index] for metric, values in self.scores.items()}
        groups = [str(self.groups[i]) for i in index] if self.groups else []
        counts = {metric: np.asarray(values)[index] for metric, values in self.counts.items()}
        return Decoded(ids.tolist(), clusters, scores, np.asarray(self.same)[index], groups, counts)
