"""How often a certified policy breaks its promise, and how often the usual way's choice does: simulated calibrations.

    python benchmarks/violations.py

Ten policies change outputs at known rates, so what each truly risks is known (calibration notes, table D). A
calibration draws fresh samples; we certify, the usual way takes the boldest policy whose observed loss is within the
tolerance. A promise is broken where the true risk of what was taken is above the tolerance.
Writes ``benchmarks/results/violations_<date>.md``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.progress import track
from targets import device, note, today

from lightning_mue.calibration import Candidate, Decoded, certify
from lightning_mue.calibration.clusters import cluster_means
from lightning_mue.files import write_text
from lightning_mue.policy import ExitPolicy, ExitRule
from lightning_mue.promise import Promise

TABLE_D = tuple(np.linspace(0.2, 1.6, 10))
"""True risks of the policies of a chain, in shares of the risk allowed, from safe to bold."""

LEVEL = 0.95
MAY_BREAK = 0.05
"""The confidence level, and the share of calibrations that it lets break their promise."""


@dataclass(frozen=True)
class World:
    """Where outputs change at known rates.

    Args:
        promise: made of its policies.
        rate: of changed outputs at which the promise is only just kept.
        graded: whether a changed output scores a part of full depth's, instead of nothing.
    """

    promise: Promise
    rate: float
    graded: bool = False

    def draw(self, rng: np.random.Generator, n: int, shares: Sequence[float]) -> list[Decoded]:
        """Return what full depth and each policy make of ``n`` fresh samples.

        One sample is hard for all policies, so their tests depend on each other, as they really do.

        Args:
            rng: draws.
            n: how many samples.
            shares: the risk of each policy, in shares of the risk allowed.
        """
        names = [f"{i:06d}" for i in range(n)]
        full = rng.beta(2, 2, n) if self.graded else (rng.random(n) < 0.7).astype(np.float64)
        luck, left = rng.random(n), rng.random(n) if self.graded else np.zeros(n)
        changed = [luck < share * self.rate for share in (0.0, *shares)]
        scores = [np.where(c, left * full, full) for c in changed]
        return [Decoded(names, names, {self.promise.metric: s}, ~c) for s, c in zip(scores, changed, strict=True)]


WORLDS = {
    "99 % of outputs the same (losses of 0 or 1)": World(Promise("consistency", keep=0.99), 0.01),
    "98 % of accuracy (signed losses)": World(Promise("accuracy", keep=0.98), 0.02),
    "0.01 of ROUGE-L at most (graded losses)": World(Promise("rouge_l", drop=0.01), 0.04, graded=True),  # half of 1/2
}


def chain_of(count: int) -> list[Candidate]:
    """Return candidates from safe to bold."""
    policies = [ExitPolicy({"decoder": ExitRule("gate", (1,), (1 - i / count,))}) for i in range(count)]
    return [Candidate(policy, i / count, 1 - i / count, {}, 1.0, {}) for i, policy in enumerate(policies)]


def certified(promise: Promise, decoded: Sequence[Decoded], seed: int, confidence_level: float = LEVEL) -> int:
    """Return which policy is certified; 0 is full depth, which comes first in ``decoded``."""
    full, chain = decoded[0], chain_of(len(decoded) - 1)
    full_scores = {metric: float(cluster_means(scores, full.clusters).mean()) for metric, scores in full.scores.items()}
    place = {candidate.policy.to_json(): i for i, candidate in enumerate(chain, 1)}
    policy, _ = certify(
        chain,
        lambda policy: decoded[place.get(policy.to_json(), 0)],
        promises=[promise],
        confidence_level=confidence_level,
        seed=seed,
        clusters=full.clusters,
        full_scores={"": full_scores},
        estimate=False,
    )
    return place.get(replace(policy, certificate=None).to_json(), 0)


def usual(promise: Promise, decoded: Sequence[Decoded]) -> int:
    """Return the boldest policy whose mean loss on the samples is within the tolerance; 0 is full depth."""
    losses = np.array([mean_loss(promise, found, decoded[0]) for found in decoded])
    return int(np.flatnonzero(losses <= promise.tolerance).max(initial=0))


def mean_loss(promise: Promise, found: Decoded, full: Decoded) -> float:
    """Return the mean over clusters of a policy's losses; ``full`` is full depth on the same samples."""
    scores, full_scores = (decoded.scores[promise.metric] for decoded in (found, full))
    return float(cluster_means(promise.losses(scores, full_scores, found.same), full.clusters).mean())


def risks(
    world: World, shares: Sequence[float], n: int, runs: int, seed: int, confidence_level: float = LEVEL
) -> tuple[np.ndarray, np.ndarray]:
    """Return the true risks, in shares of the risk allowed, of what we and the usual way take, each ``[runs]``."""
    rng, true = np.random.default_rng([n, seed]), np.array([0.0, *shares])
    ours, theirs = [], []
    for run in range(runs):
        decoded = world.draw(rng, n, shares)
        ours.append(certified(world.promise, decoded, run, confidence_level))
        theirs.append(usual(world.promise, decoded))
    return true[ours], true[theirs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--samples", type=int, nargs="+", default=[500, 1000, 2500])
    args = parser.parse_args()
    cases = [(name, n) for name in WORLDS for n in args.samples]
    found = {(name, n): risks(WORLDS[name], TABLE_D, n, args.runs, 0) for name, n in track(cases, "calibrations")}
    lines = [
        "| promise | samples | certified: broken | risk used | the usual way: broken | risk used |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (name, n), both in found.items():
        cells = " | ".join(f"{(risk > 1).mean():.1%} | {risk.mean():.2f}" for risk in both)
        lines.append(f"| {name} | {n:,} | {cells} |")
    text = (
        f"# Promises broken\n\n{today()}. {args.runs:,} simulated calibrations a line. Ten policies, true risks 0.2 to "
        f"1.6 times the allowed one; certified at {LEVEL:.0%} confidence, or the usual way: the boldest whose observed "
        "loss is within the tolerance. Broken: the true risk of what was taken is above the allowed one. Risk used: "
        "its mean, in shares of the allowed one; full depth has 0.\n\n" + "\n".join(lines) + "\n"
    )
    write_text(Path(__file__).parent / "results" / f"violations_{today()}.md", text)
    command, unit = "python benchmarks/violations.py", f"of {args.runs:,} simulated calibrations, the most of any line"
    for name, way in (("violations", 0), ("violations_usual_way", 1)):
        broken = max((both[way] > 1).mean() for both in found.values())
        note(name, broken, MAY_BREAK, "lower", unit, command, device())
    print(text)


if __name__ == "__main__":
    main()
