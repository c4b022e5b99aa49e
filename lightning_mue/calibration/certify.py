"""Certifying: decode a fixed chain of policies on fresh data and keep the fastest that passes in order.

Learn-then-Test with fixed-sequence testing (Angelopoulos et al. 2021): each policy is tested at the full level
``1 - confidence_level`` and the first failure ends it, so the chance that any accepted policy breaks the promise is at
most that level.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from typing import Any

import numpy as np
import scipy

from lightning_mue.calibration.candidates import Candidate
from lightning_mue.calibration.decoded import Decoded
from lightning_mue.calibration.losses import TestResult, check_promise, cluster_means, p_value
from lightning_mue.calibration.sample_size import samples_estimate, shortage
from lightning_mue.policy import Certificate, ExitPolicy, chain_hash


@dataclass(frozen=True)
class Tested:
    """One link of the chain, tested.

    Args:
        candidate: what was tested.
        result: the p-value and what it rests on.
        accepted: whether it passed.
        score: mean score over clusters.
        score_full_depth: of full depth on the same samples.
    """

    candidate: Candidate
    result: TestResult
    accepted: bool
    score: float
    score_full_depth: float


@dataclass(frozen=True)
class Provenance:
    """What a certificate records besides the test itself; plain JSON values, no time and no host name.

    Args:
        fingerprint: of the weights, for the full-depth policy returned if nothing passes; default: the chain's.
        data_fingerprint: of the data set.
        decode: decode settings (maximal length, precision, batch rule).
        note: put at the end of the certificate, such as ``selection_reused``.
    """

    fingerprint: str | None = None
    data_fingerprint: str = ""
    decode: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


def certify(
    chain: Sequence[Candidate],
    decode: Callable[[ExitPolicy], Decoded],
    *,
    metric: str,
    keep: float,
    confidence_level: float,
    seed: int,
    clusters: Sequence[str],
    full_score_mean: float,
    provenance: Provenance | None = None,
    on_tested: Callable[[Tested], None] | None = None,
) -> tuple[ExitPolicy, list[Tested]]:
    """Test the chain in order on fresh data; return the fastest policy that passed, with its certificate.

    Nothing passed: the full-depth policy, whose certificate's note says what would have been needed.

    Args:
        chain: from safe to bold, fixed before this data was seen (`propose`).
        decode: runs a policy on the certify split with the engine that ships; full depth comes first.
        metric: one of ``losses.METRICS``.
        keep: the fraction to keep, in (0, 1).
        confidence_level: of the promise, in (0, 1).
        seed: of the one permutation of the clusters; never the best of several.
        clusters: cluster name of every sample of the certify split; with too few, nothing is decoded.
        full_score_mean: mean full-depth score, known from the propose split; not read for consistency.
        provenance: what else the certificate records.
        on_tested: called after every test.

    Raises:
        ValueError: an impossible promise, or a policy was decoded on other samples than full depth.
    """
    check_promise(keep, metric, confidence_level)
    provenance = provenance or Provenance()
    if provenance.fingerprint is None and chain:
        provenance = replace(provenance, fingerprint=chain[0].policy.fingerprint)
    distinct = len(set(clusters))
    promise = Certificate(
        "full depth",
        metric,
        keep,
        confidence_level,
        clusters=distinct,
        seed=seed,
        chain_hash=chain_hash([candidate.policy for candidate in chain]),
        data_fingerprint=provenance.data_fingerprint,
        decode=dict(provenance.decode),
        versions=_versions(),
        note=provenance.note,
    )
    why = shortage(metric, keep, confidence_level, full_score_mean, distinct, distinct < len(clusters))
    if not chain:
        why = "No policy that is faster than full depth kept the promise on the propose split, so none was tested."
    if why:
        return _full_depth(promise, why, provenance), []
    full = decode(ExitPolicy.full_depth()).in_order()
    promise = replace(promise, split_hash=split_hash(full.sample_ids))
    tests = _test_in_order(chain, decode, full, promise, on_tested)
    accepted = [test for test in tests if test.accepted]
    if not accepted:
        return _full_depth(promise, _what_was_missing(tests[-1], promise), provenance, tests[-1]), tests
    best = min(accepted, key=lambda test: test.candidate.ms)  # of equals the first, the safer
    certificate = _with_test(replace(promise, kind="certified"), best)
    return replace(best.candidate.policy, certificate=certificate), tests


def uncertified(candidate: Candidate, metric: str, keep: float, confidence_level: float, note: str = "") -> ExitPolicy:
    """Return the candidate's policy marked as simulated only, for use inside training."""
    certificate = Certificate(
        "uncertified",
        metric,
        keep,
        confidence_level,
        mean_loss=candidate.risk,
        score=_or_none(candidate.score),
        note=note,
    )
    return replace(candidate.policy, certificate=certificate)


def split_hash(sample_ids: Sequence[str]) -> str:
    """Return the hash of a set of sample ids, in whatever order they come."""
    return hashlib.sha256("\n".join(sorted(set(sample_ids))).encode()).hexdigest()[:16]


def _test_in_order(
    chain: Sequence[Candidate],
    decode: Callable[[ExitPolicy], Decoded],
    full: Decoded,
    promise: Certificate,
    on_tested: Callable[[Tested], None] | None,
) -> list[Tested]:
    """Return the tests made: all accepted but perhaps the last, which ended the sequence."""
    tests: list[Tested] = []
    for candidate in chain:
        found = decode(candidate.policy).in_order()
        if list(found.sample_ids) != list(full.sample_ids):
            other = sorted(set(found.sample_ids) ^ set(full.sample_ids))
            raise ValueError(
                f"Policy {candidate.policy.depths_in_words()!r} must be decoded on the samples of full depth; "
                f"{len(other)} differ, such as {other[0]!r}"
            )
        scores = (found.scores, full.scores)
        result = p_value(
            promise.metric, *scores, found.same, full.clusters, promise.keep, promise.confidence_level, promise.seed
        )
        accepted = result.p <= 1 - promise.confidence_level
        means = (float(cluster_means(of, full.clusters).mean()) for of in scores)
        tests.append(Tested(candidate, result, accepted, *means))
        if on_tested is not None:
            on_tested(tests[-1])
        if not accepted:
            break
    return tests


def _full_depth(promise: Certificate, why: str, provenance: Provenance, failed: Tested | None = None) -> ExitPolicy:
    certificate = replace(promise, note=f"{why} {promise.note}".strip())
    if failed is not None:
        result = failed.result
        certificate = replace(
            certificate, n=result.n, clusters=result.clusters, score_full_depth=_or_none(failed.score_full_depth)
        )
    return ExitPolicy(fingerprint=provenance.fingerprint, certificate=certificate)


def _with_test(promise: Certificate, test: Tested) -> Certificate:
    result = test.result
    return replace(
        promise,
        n=result.n,
        clusters=result.clusters,
        p_value=result.p,
        mean_loss=result.mean_loss,
        score=_or_none(test.score),
        score_full_depth=_or_none(test.score_full_depth),
        method=result.method,
    )


def _or_none(score: float) -> float | None:
    return score if math.isfinite(score) else None


def _what_was_missing(failed: Tested, promise: Certificate) -> str:
    """Return why the first test failed and roughly how many clusters would have passed it."""
    result = failed.result
    text = (
        f"The safest candidate ({failed.candidate.policy.depths_in_words()}) had p = {result.p:.2g} on "
        f"{result.clusters} clusters with mean loss {result.mean_loss:.4f}; "
    )
    n = samples_estimate(result, promise.metric, promise.keep, promise.confidence_level)
    if n is None:
        return text + "that is more than the promise allows, so no number of clusters would do. Ask for a lower `keep`."
    return text + f"about {n} clusters would have been needed, if that mean holds. Gather more or lower `keep`."


def _versions() -> dict[str, str]:
    try:
        own = metadata.version("lightning-mue")
    except metadata.PackageNotFoundError:
        own = "uninstalled"
    return {"lightning_mue": own, "numpy": np.__version__, "scipy": scipy.__version__}
