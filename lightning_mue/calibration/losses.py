"""Losses: what a policy costs against full depth, per sample, and the test of their mean. The unit is the cluster.

A cluster is what was drawn independently (a picture with its questions); its samples are averaged first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lightning_mue.calibration.pvalues import betting_p, binomial_p

METRICS = ("accuracy", "exact_match", "exact_text", "vqa_accuracy", "anls", "character_accuracy", "consistency")
"""What can be promised: a fraction of the full-depth score (per-sample, in [0, 1]), or identical outputs."""

UPPER = 1.0
"""The largest loss possible: ``1`` (not the same), or ``(keep * 1 - 0) / keep``."""


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


def check_promise(keep: float, metric: str, confidence_level: float) -> None:
    """Refuse a promise that cannot be meant.

    Raises:
        ValueError: ``keep`` or ``confidence_level`` not in (0, 1), or an unknown metric.
    """
    if not 0 < keep < 1:
        raise ValueError(
            f"`keep` must lie in (0, 1) (the fraction of full-depth quality to keep, such as 0.98), got {keep:g}"
        )
    if metric not in METRICS:
        raise ValueError(
            f"`metric` must be one of {list(METRICS)}, got {metric!r}; 'consistency' (same output as full depth) "
            "needs no references"
        )
    if not 0 < confidence_level < 1:
        raise ValueError(f"`confidence_level` must lie in (0, 1), such as 0.95, got {confidence_level:g}")


def tolerance_of(metric: str, keep: float) -> float:
    """Return the mean loss allowed: ``1 - keep`` for consistency, 0 for retention."""
    return 1 - keep if metric == "consistency" else 0.0


def consistency_losses(same: np.ndarray) -> np.ndarray:
    """Return 0 where the output equals the full-depth output and 1 elsewhere, float64 ``[n]``."""
    same = np.asarray(same)
    if same.dtype != np.bool_:
        raise ValueError(f"`same` must be boolean (output equals the full-depth output), got {same.dtype}")
    return (~same).astype(np.float64)


def retention_losses(scores: np.ndarray, full_scores: np.ndarray, keep: float) -> np.ndarray:
    """Return ``(keep * full - score) / keep``, float64 ``[n]``, at most 1; a mean of 0 or less keeps the promise.

    ``E[score] >= keep E[full]`` is linear in the scores, so one mean decides and no ratio is estimated.

    Args:
        scores: of the policy, ``[n]`` in [0, 1].
        full_scores: of full depth on the same samples, ``[n]`` in [0, 1].
        keep: the fraction of the full-depth score to keep.

    Raises:
        ValueError: scores out of [0, 1], or of other samples.
    """
    scores, full_scores = np.asarray(scores, np.float64), np.asarray(full_scores, np.float64)
    if scores.shape != full_scores.shape:
        raise ValueError(
            f"Scores must be of the same samples, got {scores.shape} and {full_scores.shape} at full depth"
        )
    for name, values in (("scores", scores), ("full_scores", full_scores)):
        if not ((values >= 0) & (values <= 1)).all():  # also refuses NaN
            raise ValueError(f"`{name}` must lie in [0, 1], got [{values.min():g}, {values.max():g}]")
    return (keep * full_scores - scores) / keep


def sample_losses(
    metric: str, scores: np.ndarray, full_scores: np.ndarray, same: np.ndarray, keep: float
) -> np.ndarray:
    """Return the losses ``[n]`` that ``metric`` asks for."""
    return consistency_losses(same) if metric == "consistency" else retention_losses(scores, full_scores, keep)


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
    metric: str,
    scores: np.ndarray,
    full_scores: np.ndarray,
    same: np.ndarray,
    clusters: Sequence[str],
    keep: float,
    confidence_level: float,
    seed: int,
) -> TestResult:
    """Test whether a policy keeps what was promised; small ``p`` = it does.

    Consistency with one sample a cluster is tested by the exact binomial, everything else by betting on cluster means.

    Args:
        metric: one of `METRICS`.
        scores: of the policy, ``[n]`` in [0, 1]; not read for consistency.
        full_scores: of full depth, ``[n]`` in [0, 1]; not read for consistency.
        same: bool ``[n]``, the output equals the full-depth output; not read for retention.
        clusters: ``[n]`` names of what was drawn independently.
        keep: the fraction to keep, in (0, 1).
        confidence_level: the level the bets are planned for.
        seed: of the one permutation of the clusters.

    Raises:
        ValueError: an impossible promise, scores out of range, arrays of different lengths.
    """
    check_promise(keep, metric, confidence_level)
    losses = cluster_means(sample_losses(metric, scores, full_scores, same, keep), clusters)
    tolerance = tolerance_of(metric, keep)
    if metric == "consistency" and len(losses) == len(clusters):
        p, method = binomial_p(int(np.count_nonzero(losses)), len(losses), tolerance), "exact binomial"
    else:
        p, method = betting_p(losses, tolerance, UPPER, confidence_level, seed), "betting on cluster means"
    return TestResult(p, method, float(losses.mean()), len(clusters), len(losses), float(losses.std()))
