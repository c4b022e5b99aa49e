"""Candidates: policies with what they do to the propose split, and the few of them that make a chain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lightning_mue.calibration.frontier import pareto
from lightning_mue.calibration.requirements import Requirement, requirements_of
from lightning_mue.policy import ExitPolicy
from lightning_mue.promise import Promise
from lightning_mue.trace import Trace

USED_TARGETS = (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 1.1)
"""Where the chain's links lie, as fractions of the allowed loss: the first almost surely passes, the last fails."""

CAUTION = 1.645
"""Standard errors added to a predicted loss. Of thousands of simulated policies some look harmless by luck, because as
many answers changed for the better as for the worse; a chain led by one of them would end at its first test."""

DIGITS = 9
"""Risks and times that differ by less are ties."""


@dataclass(frozen=True)
class Candidate:
    """A policy and what it does to the propose split: as simulated, or, once rehearsed, as decoded.

    Args:
        policy: with the fingerprint of the trace, without a certificate.
        used: the part of the allowed loss it uses, gains not counted, ``CAUTION`` standard errors added: 0 at full
            depth, 1 where the promise is only just kept; of several promises and groups, that of the tightest.
        ms: predicted milliseconds per sample.
        score: metric -> mean over clusters.
        same: fraction of outputs identical to full depth, over clusters.
        depths: stream name -> mean exit depth (decoder: over steps).
    """

    policy: ExitPolicy
    used: float
    ms: float
    score: dict[str, float]
    same: float
    depths: dict[str, float]


class ClusterMeans:
    """Means over clusters and their standard errors, for one set of samples.

    Args:
        clusters: name of each sample's cluster, ``n`` of them.
    """

    def __init__(self, clusters: Sequence[str]) -> None:
        _, self._index = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
        self._sizes = np.bincount(self._index)

    def mean(self, values: np.ndarray) -> float:
        """Return the mean of the cluster means of ``values``, ``[n]``."""
        return float(self._means(values).mean())

    def cautious(self, values: np.ndarray) -> float:
        """Return the mean, but no gain, plus ``CAUTION`` standard errors: of many policies the best gains are luck."""
        means = self._means(values)
        return float(max(means.mean(), 0.0) + CAUTION * means.std() / np.sqrt(len(means)))

    def _means(self, values: np.ndarray) -> np.ndarray:
        return np.bincount(self._index, weights=values) / self._sizes


class Judge:
    """Turns what happened to the samples of a trace into candidates.

    Args:
        trace: the full-depth pass.
        promises: what has to be kept.
        groups: the groups that each promise is about in turn; None: all samples at once.
    """

    def __init__(self, trace: Trace, promises: Sequence[Promise], groups: Sequence[str] | None = None) -> None:
        self._trace, self._all = trace, ClusterMeans(trace.clusters)
        self._requirements = [_Allowed(r, trace) for r in requirements_of(promises, groups, trace.groups)]

    def used(self, score: Mapping[str, np.ndarray], same: np.ndarray) -> float:
        """Return the part of the allowed loss used, with caution, when samples score so and stay the same or not."""
        return max(requirement.used(score, same) for requirement in self._requirements)

    def candidate(
        self, policy: ExitPolicy, score: Mapping[str, np.ndarray], same: np.ndarray, ms: float, depths: dict[str, float]
    ) -> Candidate:
        """Return the candidate whose samples score so, ``[n]``, and stay the same or not, bool ``[n]``."""
        means = {metric: self._all.mean(score[metric]) for metric in self._trace.full_score}
        return Candidate(policy, self.used(score, same), ms, means, self._all.mean(same), depths)


class _Allowed:
    """What one requirement allows to be lost beyond full depth."""

    def __init__(self, requirement: Requirement, trace: Trace) -> None:
        self._promise, self._rows = requirement.promise, requirement.rows
        self._clusters = ClusterMeans([trace.clusters[i] for i in self._rows])
        self._full = trace.full_score.get(self._promise.metric, _NONE)
        self._full = self._full[self._rows] if len(self._full) else _NONE
        unchanged = np.ones(len(self._rows), dtype=bool)
        self._at_full_depth = self._promise.losses(self._full, self._full, unchanged)
        self._allowed = self._promise.tolerance - self._clusters.mean(self._at_full_depth)

    def used(self, score: Mapping[str, np.ndarray], same: np.ndarray) -> float:
        mine = score[self._promise.metric][self._rows] if self._promise.metric in score else _NONE
        losses = self._promise.losses(mine, self._full, same[self._rows])
        return self._clusters.cautious(losses - self._at_full_depth) / max(self._allowed, 1e-12)


_NONE = np.zeros(0)


def frontier_of(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the frontier; of equals, the one whose policy comes first as text."""
    by_text = {candidate.policy.to_json(): candidate for candidate in candidates}
    ordered = [by_text[text] for text in sorted(by_text)]
    risk = np.round([candidate.used for candidate in ordered], DIGITS)
    ms = np.round([candidate.ms for candidate in ordered], DIGITS)
    return [ordered[i] for i in pareto(risk, ms)]


def chain_of(frontier: Sequence[Candidate], full_ms: float) -> list[Candidate]:
    """Return, for each target, the fastest candidate that uses no more than that much of the allowed loss."""
    faster = [candidate for candidate in frontier if round(candidate.ms, DIGITS) < round(full_ms, DIGITS)]
    chain: list[Candidate] = []
    for target in USED_TARGETS:
        within = [candidate for candidate in faster if candidate.used <= target]
        if within and within[-1] not in chain:
            chain.append(within[-1])
    return chain
