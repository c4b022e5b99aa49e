"""Clusters drawn again: what is approximate here, intervals of estimates and tests of corpus metrics, rests on it.

It is right for many clusters and too sure of itself for few.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightning_mue.calibration.clusters import cluster_means, cluster_sums
from lightning_mue.corpus import CORPUS

RESAMPLES = 2000

AT_LEAST = 30
"""Clusters for an interval."""


def paired_scores(
    metric: str, values: np.ndarray, full_values: np.ndarray, clusters: Sequence[str], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the scores of a policy and of full depth, float64 ``[1 + RESAMPLES]``: as found, then redrawn in pairs.

    As many clusters as there are, with replacement (Efron 1979; paired for comparisons of systems, Koehn 2004).

    Args:
        metric: the mean over clusters, or if it is of a corpus, computed from all counts.
        values: of the policy: scores ``[n]``, or counts ``[n, K]`` for a metric of a corpus.
        full_values: of full depth on the same samples.
        clusters: ``[n]`` names of what was drawn independently.
        seed: of the draws.
    """
    if metric in CORPUS:
        sums = [cluster_sums(of, clusters) for of in (values, full_values)]
        ours_KR, theirs_KR = np.split(_drawn(np.hstack(sums), seed), 2)
        return np.asarray(CORPUS[metric](ours_KR), np.float64), np.asarray(CORPUS[metric](theirs_KR), np.float64)
    means_C2 = np.stack([cluster_means(of, clusters) for of in (values, full_values)], axis=1)
    ours_R, theirs_R = _drawn(means_C2, seed) / len(means_C2)
    return ours_R, theirs_R


def kept_interval(
    metric: str,
    values: np.ndarray,
    full_values: np.ndarray,
    clusters: Sequence[str],
    confidence_level: float,
    seed: int,
) -> tuple[float, float] | None:
    """Return the interval of the share of full depth's score that is kept: percentiles over clusters drawn again.

    None for fewer than ``AT_LEAST``, or where nothing differs, which drawing again cannot tell apart from certainty.
    """
    differ = cluster_sums(values, clusters) - cluster_sums(full_values, clusters)
    if len(differ) < AT_LEAST or not np.ptp(differ, axis=0).any():
        return None
    ours, theirs = paired_scores(metric, values, full_values, clusters, seed)
    tail = (1 - confidence_level) / 2
    low, high = np.quantile(ours[1:] / np.maximum(theirs[1:], 1e-12), [tail, 1 - tail])
    return float(low), float(high)


def score_of(metric: str, values: np.ndarray, clusters: Sequence[str]) -> float:
    """Return the score of a split: the mean over clusters of scores ``[n]``, or from all counts ``[n, K]``."""
    if metric in CORPUS:
        return float(CORPUS[metric](np.sum(values, axis=0)))
    return float(cluster_means(values, clusters).mean())


def _drawn(values_CK: np.ndarray, seed: int) -> np.ndarray:
    """Return sums ``[K, 1 + RESAMPLES]``: over all clusters, then over as many drawn again."""
    rng, count = np.random.default_rng(seed), len(values_CK)
    alike = np.full(count, 1 / count)
    times = [np.ones(count), *(rng.multinomial(count, alike) for _ in range(RESAMPLES))]
    return np.stack([t_C @ values_CK for t_C in times], axis=1)
