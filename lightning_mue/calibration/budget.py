"""The reverse question: so many milliseconds may be spent; how much quality can be promised for them?

One policy is chosen on the propose split, before other data is seen, so its confidence bound needs no correction for
the search.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from lightning_mue.calibration.certify import Decode, Provenance, split_hash
from lightning_mue.calibration.decoded import Decoded
from lightning_mue.calibration.losses import check_level, p_values
from lightning_mue.calibration.propose import Proposal
from lightning_mue.calibration.tested import Tested, test_policy
from lightning_mue.certificate import kind_of
from lightning_mue.policy import ExitPolicy, chain_hash
from lightning_mue.promise import Promise

KEEPS = np.arange(500, 1000) / 1000
"""Shares that may be promised within a budget."""

TRIED = 8
"""Policies within the budget that are decoded on the propose split."""


def within_budget(proposal: Proposal, budget_ms: float) -> Proposal:
    """Return the proposal whose policies worth decoding are the least harmful of those fast enough.

    Raises:
        ValueError: none is fast enough.
    """
    fast = [c for c in (*proposal.frontier, *proposal.statics) if c.ms <= budget_ms]
    if not fast:
        fastest = min(c.ms for c in (*proposal.frontier, *proposal.statics))
        raise ValueError(
            f"No policy takes at most {budget_ms:.3g} ms; the fastest is predicted at {fastest:.3g} ms, full depth at "
            f"{proposal.full_depth.ms:.3g} ms. Allow more time"
        )
    unique = {c.policy.to_json(): c for c in fast}
    return replace(proposal, chain=[], worth_decoding=sorted(unique.values(), key=lambda c: (c.used, c.ms))[:TRIED])


def best_within(proposal: Proposal, budget_ms: float) -> Proposal:
    """Return the rehearsed proposal with one link: the least harmful that is fast enough."""
    best = min((c for c in proposal.frontier if c.ms <= budget_ms), key=lambda c: (c.used, c.ms))
    return replace(proposal, chain=[best])


def kept_bound(
    promise: Promise,
    scores: np.ndarray,
    full_scores: np.ndarray,
    same: np.ndarray,
    clusters: Sequence[str],
    confidence_level: float,
    seed: int,
) -> float | None:
    """Return the largest share that is kept with confidence; None if not even the least of ``KEEPS`` is.

    The largest of ``KEEPS`` such that it and all below pass their tests: a bound that is too high would mean that the
    first share above the true one had passed, which happens with probability ``1 - confidence_level`` at most.

    Args:
        promise: of which metric, and up to which cap.
        scores: as in ``p_values``.
        full_scores: as in ``p_values``.
        same: as in ``p_values``.
        clusters: as in ``p_values``.
        confidence_level: of the bound.
        seed: as in ``p_values``.
    """
    asked, bound = [replace(promise, keep=keep, drop=None) for keep in KEEPS.tolist()], None
    found = p_values(asked, scores, full_scores, same, clusters, confidence_level, seed)
    for one, result in zip(asked, found, strict=True):
        if result.p > 1 - confidence_level:
            break
        bound = one.keep
    return bound


def certify_budget(
    proposal: Proposal,
    decode: Decode,
    *,
    confidence_level: float,
    seed: int,
    provenance: Provenance,
    on_tested: Callable[[Tested], None] | None = None,
) -> tuple[ExitPolicy, list[Tested]]:
    """Return the policy within the budget, certified to keep the largest share of each metric that can be shown.

    Several metrics share the risk of error equally. Shown too little: full depth, whatever it takes.

    Args:
        proposal: of `best_within`: one link.
        decode: runs a policy on the certify split with the engine that ships.
        confidence_level: of all bounds together, in (0, 1).
        seed: of the one permutation of the clusters.
        provenance: what else the certificate records.
        on_tested: called after the test.
    """
    check_level(confidence_level)
    (candidate,) = proposal.chain
    full = decode(ExitPolicy.full_depth()).in_order()
    found = full if candidate.policy.is_full_depth else decode(candidate.policy).in_order()
    each = 1 - (1 - confidence_level) / len(proposal.promises)
    bounds = [_bound(promise, found, full, each, seed) for promise in proposal.promises]
    shown = [
        replace(promise, keep=bound if bound is not None else float(KEEPS[0]), drop=None)
        for promise, bound in zip(proposal.promises, bounds, strict=True)
    ]
    tested = test_policy(candidate, found, full, shown, None, each, seed, False)
    if on_tested is not None:
        on_tested(tested)
    record = provenance.certificate(tested.evidence, confidence_level, seed, chain_hash([candidate.policy]))
    record = replace(record, split_hash=split_hash(full.sample_ids))
    if None in bounds:
        why = f"Within the budget no {KEEPS[0]:.0%} of full depth could be shown to be kept."
        record = replace(record, note=f"{why} {record.note}".strip())
        return ExitPolicy(fingerprint=candidate.policy.fingerprint, certificate=record), [tested]
    return replace(candidate.policy, certificate=replace(record, kind=kind_of(record.evidence))), [tested]


def _bound(promise: Promise, found: Decoded, full: Decoded, confidence_level: float, seed: int) -> float | None:
    return kept_bound(
        promise, found.values(promise), full.values(promise), found.same, full.clusters, confidence_level, seed
    )
