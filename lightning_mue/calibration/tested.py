"""What one decoding of one policy says of all that was promised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_mue.calibration.bootstrap import kept_interval, score_of
from lightning_mue.calibration.candidates import Candidate
from lightning_mue.calibration.decoded import Decoded
from lightning_mue.calibration.losses import TestResult, p_value
from lightning_mue.calibration.requirements import Requirement, requirements_of
from lightning_mue.certificate import Evidence
from lightning_mue.promise import Promise


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


def _test(
    requirement: Requirement, found: Decoded, full: Decoded, confidence_level: float, seed: int, estimated: bool
) -> tuple[TestResult, float, Evidence]:
    """Return the test of one requirement, the part of its allowed loss that was used, and both as evidence."""
    promise, rows = requirement.promise, requirement.rows
    clusters, same = [full.clusters[i] for i in rows], found.same[rows]
    values, full_values = found.values(promise)[rows], full.values(promise)[rows]
    result = p_value(promise, values, full_values, same, clusters, confidence_level, seed)
    ours, theirs = (score_of(promise.metric, of, clusters) for of in (values, full_values))
    start = promise.loss_of_full_depth(theirs)
    used = (result.mean_loss - start) / max(promise.tolerance - start, 1e-12)
    scored, interval = promise.metric != "consistency", None
    if estimated:
        interval = kept_interval(promise.metric, values, full_values, clusters, confidence_level, seed)
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
        interval=interval,
        estimated=estimated,
        method=result.method,
    )
    return result, used, evidence
