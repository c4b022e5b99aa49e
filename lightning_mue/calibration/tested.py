"""What one decoding of one policy says of all that was promised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lightning_mue.calibration.candidates import Candidate
from lightning_mue.calibration.decoded import Decoded
from lightning_mue.calibration.losses import TestResult, cluster_means, p_value
from lightning_mue.calibration.requirements import Requirement, requirements_of
from lightning_mue.certificate import Evidence
from lightning_mue.promise import Promise

RESAMPLES = 2000
"""Of the clusters, for an interval."""

AT_LEAST = 30
"""Clusters for an interval."""


@dataclass(frozen=True)
class Tested:
    """One link of the chain, tested.

    Args:
        candidate: what was tested.
        evidence: of every promise and group.
        result: the test of the promise that came off worst: its p-value is that of the policy.
        used: the part of the allowed loss that was used, of the promise that is tightest.
        accepted: whether it passed; for an estimate, whether everything promised was kept on the samples there are.
    """

    candidate: Candidate
    evidence: tuple[Evidence, ...]
    result: TestResult
    used: float
    accepted: bool

    @property
    def worst(self) -> Evidence:
        """The evidence that ``result`` belongs to."""
        return max(self.evidence, key=lambda evidence: evidence.p_value or 0.0)


def test_policy(
    candidate: Candidate,
    found: Decoded,
    full: Decoded,
    promises: Sequence[Promise],
    groups: Sequence[str] | None,
    confidence_level: float,
    seed: int,
    estimated: bool,
) -> Tested:
    """Return what decoding says of a policy.

    Args:
        candidate: what was decoded.
        found: what it produced.
        full: what full depth produced on the same samples, in the same order.
        promises: what it has to keep, all of them.
        groups: in each of these groups of samples; None: over all samples.
        confidence_level: of the promises.
        seed: of the one permutation of the clusters, and of resampling.
        estimated: judge by the samples there are, with intervals, instead of by p-values.
    """
    group_of = full.groups if groups is not None else full.sample_ids
    of_all = [
        _test(requirement, found, full, confidence_level, seed, estimated)
        for requirement in requirements_of(promises, groups, group_of)
    ]
    worst = max((result for result, _, _ in of_all), key=lambda result: result.p)
    used = max(used for _, used, _ in of_all)
    kept = used <= 1.0 if estimated else worst.p <= 1 - confidence_level
    return Tested(candidate, tuple(evidence for _, _, evidence in of_all), worst, used, kept)


test_policy.__test__ = False  # type: ignore[attr-defined]  # not a test case, whatever its name tells pytest


def kept_interval(
    scores: np.ndarray, full_scores: np.ndarray, clusters: Sequence[str], confidence_level: float, seed: int
) -> tuple[float, float] | None:
    """Return the interval of ``mean(scores) / mean(full_scores)``: percentiles over clusters drawn again.

    Approximate, and too narrow for few clusters: None for fewer than ``AT_LEAST``, or where all keep the same share,
    which drawing again cannot tell apart from certainty.
    """
    ours, theirs = cluster_means(scores, clusters), cluster_means(full_scores, clusters)
    if len(ours) < AT_LEAST or np.ptp(ours - theirs) == 0:
        return None
    rng, tail = np.random.default_rng(seed), (1 - confidence_level) / 2
    drawn = (rng.integers(0, len(ours), len(ours)) for _ in range(RESAMPLES))
    low, high = np.quantile([ours[d].mean() / max(theirs[d].mean(), 1e-12) for d in drawn], [tail, 1 - tail])
    return float(low), float(high)


def _test(
    requirement: Requirement, found: Decoded, full: Decoded, confidence_level: float, seed: int, estimated: bool
) -> tuple[TestResult, float, Evidence]:
    """Return the test of one requirement, the part of its allowed loss that was used, and both as evidence."""
    promise, rows = requirement.promise, requirement.rows
    clusters, same = [full.clusters[i] for i in rows], found.same[rows]
    if promise.metric == "consistency":
        scores, full_scores = same.astype(np.float64), np.ones(len(rows))
    else:
        capped = (np.minimum(decoded.scores[promise.metric], promise.highest) for decoded in (found, full))
        scores, full_scores = (values[rows] for values in capped)
    result = p_value(promise, scores, full_scores, same, clusters, confidence_level, seed)
    unchanged = promise.losses(full_scores, full_scores, np.ones(len(rows), dtype=bool))
    start = float(cluster_means(unchanged, clusters).mean())
    used = (result.mean_loss - start) / max(promise.tolerance - start, 1e-12)
    ours, theirs = (float(cluster_means(of, clusters).mean()) for of in (scores, full_scores))
    scored = promise.metric != "consistency"
    evidence = Evidence(
        promise,
        requirement.group,
        result.n,
        result.clusters,
        result.p,
        result.mean_loss,
        ours if scored else None,
        theirs if scored else None,
        kept=ours / theirs if theirs else None,
        interval=kept_interval(scores, full_scores, clusters, confidence_level, seed) if estimated else None,
        estimated=estimated,
        method=result.method,
    )
    return result, used, evidence
