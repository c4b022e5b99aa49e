"""Certifying: decode a fixed chain of policies on fresh data and keep the fastest that passes in order.

Learn-then-Test with fixed-sequence testing (Angelopoulos et al. 2021): each policy is tested at the full level
``1 - confidence_level`` and the first failure ends it, so the chance that any accepted policy breaks the promise is at
most that level.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from typing import Any

import numpy as np
import scipy

from lightning_mue.calibration.candidates import Candidate
from lightning_mue.calibration.decoded import Decoded
from lightning_mue.calibration.losses import check_level
from lightning_mue.calibration.requirements import requirements_of
from lightning_mue.calibration.sample_size import samples_estimate, shortage
from lightning_mue.calibration.tested import Tested, test_policy
from lightning_mue.certificate import Certificate, Evidence, kind_of
from lightning_mue.policy import ExitPolicy, chain_hash
from lightning_mue.promise import Promise

FullScores = Mapping[str, Mapping[str, float]]
"""Group ("" for all) -> metric -> mean score."""

Decode = Callable[[ExitPolicy], Decoded]
"""Runs a policy on the certify split with the engine that ships; full depth comes first."""


@dataclass(frozen=True)
class Provenance:
    """What a certificate records besides the test itself; plain JSON values, no time and no host name.

    Args:
        fingerprint: of the weights, for the full-depth policy returned if nothing passes; default: the chain's.
        data_fingerprint: of the data set.
        decode: decode settings (maximal length, precision, batch rule, document frequencies).
        note: put at the end of the certificate, such as ``selection_reused``.
    """

    fingerprint: str | None = None
    data_fingerprint: str = ""
    decode: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""

    def certificate(self, evidence: Sequence[Evidence], confidence_level: float, seed: int, chain: str) -> Certificate:
        """Return the certificate of full depth, before anything was decoded."""
        return Certificate(
            "full depth",
            tuple(evidence),
            confidence_level,
            seed,
            chain_hash=chain,
            data_fingerprint=self.data_fingerprint,
            decode=dict(self.decode),
            versions=_versions(),
            note=self.note,
        )


def certify(
    chain: Sequence[Candidate],
    decode: Decode,
    *,
    promises: Sequence[Promise],
    confidence_level: float,
    seed: int,
    clusters: Sequence[str],
    full_scores: FullScores,
    groups: Sequence[str] | None = None,
    group_of: Sequence[str] = (),
    estimate: bool = True,
    provenance: Provenance | None = None,
    on_tested: Callable[[Tested], None] | None = None,
) -> tuple[ExitPolicy, list[Tested]]:
    """Test the chain in order on fresh data; return the fastest policy that passed, with its certificate.

    Of several promises and groups a policy has to keep all: the largest of their p-values is a p-value of "one of them
    is broken", without correction. Too few samples to pass any test: an estimate takes its place, and promises nothing.
    Nothing passed: the full-depth policy, whose certificate's note says what would have been needed.

    Args:
        chain: from safe to bold, fixed before this data was seen (`propose`).
        decode: runs a policy on the certify split.
        promises: what a policy has to keep, all of them.
        confidence_level: of all promises together, in (0, 1).
        seed: of the one permutation of the clusters; never the best of several.
        clusters: cluster name of every sample of the certify split.
        full_scores: mean full-depth scores over clusters, of what a cap lets count; known from the propose split.
        groups: keep the promises in each of these groups of samples; None: over all samples.
        group_of: the group of every sample of the certify split.
        estimate: whether too few samples are decoded for an estimate, or not at all.
        provenance: what else the certificate records.
        on_tested: called after every test.

    Raises:
        ValueError: an impossible level, or a policy was decoded on other samples than full depth.
    """
    check_level(confidence_level)
    provenance = provenance or Provenance()
    if provenance.fingerprint is None and chain:
        provenance = replace(provenance, fingerprint=chain[0].policy.fingerprint)
    policies = [candidate.policy for candidate in chain]
    sizes = _sizes(promises, clusters, groups, group_of)
    record = provenance.certificate(sizes, confidence_level, seed, chain_hash(policies))
    if not chain:
        why = "No policy that is faster than full depth kept the promise on the propose split, so none was tested."
        return _full_depth(record, why, provenance), []
    few, hopeless = _too_few(sizes, confidence_level, full_scores)
    if few and (hopeless or not estimate):
        return _full_depth(record, few, provenance), []
    full = decode(ExitPolicy.full_depth()).in_order()
    record = replace(record, split_hash=split_hash(full.sample_ids))
    tests = _test_in_order(chain, decode, full, record, promises, groups, bool(few), on_tested)
    accepted = [test for test in tests if test.accepted]
    if not accepted:
        why = few or _what_was_missing(tests[-1], confidence_level)
        return _full_depth(replace(record, evidence=tests[-1].evidence), why, provenance), tests
    best = min(accepted, key=lambda test: test.candidate.ms)  # of equals the first, the safer
    kind, note = ("estimate", few) if few else (kind_of(best.evidence), "")
    certificate = replace(record, kind=kind, evidence=best.evidence, note=f"{note} {record.note}".strip())
    return replace(best.candidate.policy, certificate=certificate), tests


def worth_decoding(
    promises: Sequence[Promise],
    confidence_level: float,
    clusters: Sequence[str],
    full_scores: FullScores,
    groups: Sequence[str] | None = None,
    group_of: Sequence[str] = (),
    estimate: bool = True,
) -> bool:
    """Return whether `certify`, given the same, will decode anything: whether there are samples enough."""
    few, hopeless = _too_few(_sizes(promises, clusters, groups, group_of), confidence_level, full_scores)
    return not few or (estimate and not hopeless)


def uncertified(
    candidate: Candidate, promises: Sequence[Promise], confidence_level: float, note: str = ""
) -> ExitPolicy:
    """Return the candidate's policy marked as simulated only, for use inside training."""
    evidence = tuple(Evidence(promise, score=candidate.score.get(promise.metric)) for promise in promises)
    return replace(candidate.policy, certificate=Certificate("uncertified", evidence, confidence_level, note=note))


def groups_large_enough(
    promises: Sequence[Promise],
    confidence_level: float,
    full_scores: FullScores,
    clusters: Sequence[str],
    group_of: Sequence[str],
) -> tuple[str, ...]:
    """Return the groups of which every promise can be certified; the others have to run at full depth.

    Args:
        promises: to be kept in each group.
        confidence_level: of the promises.
        full_scores: group -> metric -> mean full-depth score, known from the propose split; a group that is not there
            is not large enough.
        clusters: cluster name of every sample of the certify split.
        group_of: its group.
    """
    counted = Counter(group_of)
    distinct = Counter(group for _, group in set(zip(clusters, group_of, strict=True)))

    def enough(group: str) -> bool:
        found = (Evidence(promise, group, counted[group], distinct[group]) for promise in promises)
        return not any(_shortage(e, confidence_level, full_scores) for e in found)

    return tuple(group for group in sorted(distinct) if group in full_scores and enough(group))


def split_hash(sample_ids: Sequence[str]) -> str:
    """Return the hash of a set of sample ids, in whatever order they come."""
    return hashlib.sha256("\n".join(sorted(set(sample_ids))).encode()).hexdigest()[:16]


def _score(evidence: Evidence, full_scores: FullScores) -> float:
    """Return full depth's mean score; consistency reads none."""
    return full_scores[evidence.group].get(evidence.promise.metric, 1.0)


def _sizes(
    promises: Sequence[Promise], clusters: Sequence[str], groups: Sequence[str] | None, group_of: Sequence[str]
) -> list[Evidence]:
    """Return every promise of every group with its numbers of samples and clusters."""
    return [
        Evidence(r.promise, r.group, len(r.rows), len({clusters[i] for i in r.rows}))
        for r in requirements_of(promises, groups, group_of if groups is not None else clusters)
    ]


def _too_few(sizes: Sequence[Evidence], confidence_level: float, full_scores: FullScores) -> tuple[str | None, bool]:
    """Return why there are too few samples, None if there are enough; and whether no number of them would do."""
    few = next((text for e in sizes if (text := _shortage(e, confidence_level, full_scores))), None)
    hopeless = any(not e.promise.loss_of_full_depth(_score(e, full_scores)) < e.promise.tolerance for e in sizes)
    return few, hopeless


def _shortage(evidence: Evidence, confidence_level: float, full_scores: FullScores) -> str | None:
    """Return why there are too few samples for one promise of one group; None if there are enough."""
    n, clusters = evidence.n, evidence.clusters
    found = shortage(evidence.promise, confidence_level, _score(evidence, full_scores), clusters, clusters < n)
    return f"Group {evidence.group!r}: {found}" if found and evidence.group else found


def _test_in_order(
    chain: Sequence[Candidate],
    decode: Decode,
    full: Decoded,
    record: Certificate,
    promises: Sequence[Promise],
    groups: Sequence[str] | None,
    estimated: bool,
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
        how = (promises, groups, record.confidence_level, record.seed, estimated)
        tests.append(test_policy(candidate, found, full, *how))
        if on_tested is not None:
            on_tested(tests[-1])
        if not tests[-1].accepted:
            break
    return tests


def _full_depth(record: Certificate, why: str, provenance: Provenance) -> ExitPolicy:
    certificate = replace(record, note=f"{why} {record.note}".strip())
    return ExitPolicy(fingerprint=provenance.fingerprint, certificate=certificate)


def _what_was_missing(failed: Tested, confidence_level: float) -> str:
    """Return why the first test failed and roughly how many clusters would have passed it."""
    promise, result = failed.worst, failed.result
    text = (
        f"The safest candidate ({failed.candidate.policy.depths_in_words()}) had p = {result.p:.2g} on "
        f"{result.clusters} clusters with mean loss {result.mean_loss:.4f} ({promise.subject}); "
    )
    n = samples_estimate(result, promise.promise, confidence_level)
    if n is None:
        return text + "that is more than the promise allows, so no number of clusters would do. Promise less."
    return text + f"about {n} clusters would have been needed, if that mean holds. Gather more or promise less."


def _versions() -> dict[str, str]:
    try:
        own = metadata.version("lightning-mue")
    except metadata.PackageNotFoundError:
        own = "uninstalled"
    return {"lightning_mue": own, "numpy": np.__version__, "scipy": scipy.__version__}
