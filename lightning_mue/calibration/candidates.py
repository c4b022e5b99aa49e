"""Candidates: policies with what they do to the propose split, and the few of them that make a chain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lightning_mue.calibration.frontier import pareto
from lightning_mue.calibration.losses import sample_losses, tolerance_of
from lightning_mue.policy import ExitPolicy
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
        risk: mean loss over clusters, the number that will be tested.
        used: the part of the allowed loss it uses, gains not counted, ``CAUTION`` standard errors added: 0 at full
            depth, 1 where the promise is only just kept.
        ms: predicted milliseconds per sample.
        score: mean metric score over clusters.
        same: fraction of outputs identical to full depth, over clusters.
        depths: stream name -> mean exit depth (decoder: over steps).
    """

    policy: ExitPolicy
    risk: float
    used: float
    ms: float
    score: float
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
        metric: of the promise.
        keep: of the promise.
    """

    def __init__(self, trace: Trace, metric: str, keep: float) -> None:
        self.weights, self._trace, self._metric, self._keep = ClusterMeans(trace.clusters), trace, metric, keep
        unchanged = np.ones(len(trace), dtype=bool)
        self._at_full_depth = sample_losses(metric, trace.full_score, trace.full_score, unchanged, keep)
        self.allowed = tolerance_of(metric, keep) - self.weights.mean(self._at_full_depth)
        """How much more than full depth a policy may lose."""

    def harm(self, change: np.ndarray, same: np.ndarray) -> float:
        """Return the mean loss, with caution, that one stream adds where it changes scores, or outputs, so: ``[n]``."""
        return self.weights.cautious(~same if self._metric == "consistency" else -change / self._keep)

    def candidate(
        self, policy: ExitPolicy, score: np.ndarray, same: np.ndarray, ms: float, depths: dict[str, float]
    ) -> Candidate:
        """Return the candidate whose samples score so, ``[n]``, and stay the same or not, bool ``[n]``."""
        losses = sample_losses(self._metric, score, self._trace.full_score, same, self._keep)
        used = self.weights.cautious(losses - self._at_full_depth) / max(self.allowed, 1e-12)
        mean = self.weights.mean
        return Candidate(policy, mean(losses), used, ms, mean(score), mean(same), depths)


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
