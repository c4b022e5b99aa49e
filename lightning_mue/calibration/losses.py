"""The test of a promise: losses of samples, averaged over clusters, and the p-value of their mean.

A cluster is what was drawn independently (a picture with its questions); its samples are averaged first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lightning_mue.calibration.pvalues import betting_p, binomial_p
from lightning_mue.promise import UPPER, Promise


@dataclass(frozen=True)
class TestResult:
    """One test of one policy.

    Args:
        p: the p-value of "the risk exceeds the tolerance".
        method: how it was computed.
        mean_loss: over clusters.
        n: samples.
        clusters: independent units.
        sd: standard deviation of the loss over clusters.
    """

    __test__ = False  # not a test case, whatever its name tells pytest

    p: float
    method: str
    mean_loss: float
    n: int
    clusters: int
    sd: float


def check_level(confidence_level: float) -> None:
    """Refuse a level that no data can reach, or that says nothing.

    Raises:
        ValueError: it is not in (0, 1).
    """
    if not 0 < confidence_level < 1:
        raise ValueError(f"`confidence_level` must lie in (0, 1), such as 0.95, got {confidence_level:g}")


def cluster_means(values: np.ndarray, clusters: Sequence[str]) -> np.ndarray:
    """Return the mean of ``values`` per cluster, in the order of the clusters' names.

    Raises:
        ValueError: not one cluster name per value.
    """
    values = np.asarray(values, np.float64)
    if len(clusters) != len(values):
        raise ValueError(f"Every sample needs a cluster: got {len(values)} samples and {len(clusters)} cluster names")
    _, index = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    return np.bincount(index, values) / np.bincount(index)


def p_value(
    promise: Promise,
    scores: np.ndarray,
    full_scores: np.ndarray,
    same: np.ndarray,
    clusters: Sequence[str],
    confidence_level: float,
    seed: int,
) -> TestResult:
    """Test whether a policy keeps what was promised; small ``p`` = it does.

    Consistency with one sample a cluster is tested by the exact binomial, everything else by betting on cluster means.

    Args:
        promise: what is tested.
        scores: of the policy, ``[n]``; not read for consistency.
        full_scores: of full depth, ``[n]``; not read for consistency.
        same: bool ``[n]``, the output equals the full-depth output; read for consistency alone.
        clusters: ``[n]`` names of what was drawn independently.
        confidence_level: the level the bets are planned for.
        seed: of the one permutation of the clusters.

    Raises:
        ValueError: scores out of range, arrays of different lengths.
    """
    check_level(confidence_level)
    losses = cluster_means(promise.losses(scores, full_scores, same), clusters)
    if promise.metric == "consistency" and len(losses) == len(clusters):
        p, method = binomial_p(int(np.count_nonzero(losses)), len(losses), promise.tolerance), "exact binomial"
    else:
        p, method = betting_p(losses, promise.tolerance, UPPER, confidence_level, seed), "betting on cluster means"
    return TestResult(p, method, float(losses.mean()), len(clusters), len(losses), float(losses.std()))
