"""The test of a promise: losses of samples, averaged over clusters, and the p-value of their mean."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lightning_mue.calibration.bootstrap import paired_scores
from lightning_mue.calibration.clusters import cluster_means
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


def _of_corpora(promise: Promise, pairs: tuple[np.ndarray, np.ndarray], clusters: Sequence[str]) -> TestResult:
    """Return the share of corpora drawn again that break the promise, as p-value (paired bootstrap, Koehn 2004)."""
    losses = promise.losses(*pairs, np.zeros(0, bool))
    found, drawn, units = float(losses[0]), losses[1:], len(set(clusters))
    p = float((1 + np.count_nonzero(drawn > promise.tolerance)) / (1 + len(drawn)))
    return TestResult(p, "paired bootstrap of clusters", found, len(clusters), units, float(drawn.std() * units**0.5))


def _of_samples(promise: Promise, losses_n: np.ndarray, clusters: Sequence[str], level: float, seed: int) -> TestResult:
    losses = cluster_means(losses_n, clusters)
    if promise.metric == "consistency" and len(losses) == len(clusters):
        p, method = binomial_p(int(np.count_nonzero(losses)), len(losses), promise.tolerance), "exact binomial"
    else:
        p, method = betting_p(losses, promise.tolerance, UPPER, level, seed), "betting on cluster means"
    return TestResult(p, method, float(losses.mean()), len(clusters), len(losses), float(losses.std()))


def p_values(
    promises: Iterable[Promise],
    scores: np.ndarray,
    full_scores: np.ndarray,
    same: np.ndarray,
    clusters: Sequence[str],
    confidence_level: float,
    seed: int,
) -> Iterator[TestResult]:
    """Test one by one whether a policy keeps what was promised; small ``p`` = it does.

    Consistency with one sample a cluster is tested by the exact binomial, a metric of a corpus by drawing clusters
    again (approximate; once for all promises), everything else by betting on cluster means.

    Args:
        promises: what is tested, of one metric.
        scores: of the policy, ``[n]``, or counts ``[n, K]`` for a metric of a corpus; not read for consistency.
        full_scores: of full depth, likewise.
        same: bool ``[n]``, the output equals the full-depth output; read for consistency alone.
        clusters: ``[n]`` names of what was drawn independently.
        confidence_level: the level the bets are planned for.
        seed: of the one permutation of the clusters.

    Raises:
        ValueError: scores out of range, arrays of different lengths.
    """
    check_level(confidence_level)
    pairs: tuple[np.ndarray, np.ndarray] | None = None
    for promise in promises:
        if promise.approximate:
            pairs = pairs or paired_scores(promise.metric, scores, full_scores, clusters, seed)
            yield _of_corpora(promise, pairs, clusters)
        else:
            yield _of_samples(promise, promise.losses(scores, full_scores, same), clusters, confidence_level, seed)


def p_value(
    promise: Promise,
    scores: np.ndarray,
    full_scores: np.ndarray,
    same: np.ndarray,
    clusters: Sequence[str],
    confidence_level: float,
    seed: int,
) -> TestResult:
    """Test one promise, as ``p_values`` does."""
    return next(p_values([promise], scores, full_scores, same, clusters, confidence_level, seed))
