"""Calibrations on real decodes: how often they break their promise, what the guarantee costs, what simulation is worth.

    python benchmarks/calibrations.py --ckpt_path CKPT --name easyvqa --metric accuracy --cache FOLDER

A chain is proposed and rehearsed as in any calibration, and goes on to policies that break the promise. Each policy is
decoded once on the whole pool of calibration data (kept in FOLDER). A calibration then draws as many clusters as
certify, with replacement, from that pool, and is judged by the pool's mean: for it, the pool is the world.
Writes ``benchmarks/results/calibrations_<name>_<date>.md``.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from papers.task import Task, arguments, command
from pool import Pool, taken
from rich.progress import track
from targets import device, note, today
from violations import LEVEL, MAY_BREAK, certified, mean_loss, usual

from lightning_mue.calibration import Candidate, Decoded, Proposal, propose, rehearse, simulate
from lightning_mue.files import write_text
from lightning_mue.methods import in_words
from lightning_mue.policy import ExitPolicy
from lightning_mue.promise import Promise

BEYOND = (1.5, 2.0, 3.0, 5.0, 8.0)
"""Where the chain goes on, in shares of the allowed loss: what a calibration should not take."""


@dataclass(frozen=True)
class Line:
    """A policy on the way from safe to bold. Parts are those of the allowed loss that it uses.

    Args:
        policy: decoded and timed.
        proposed: part, as the search says: with caution.
        simulated: part, without caution, on the samples that propose.
        decoded: part, on them.
        elsewhere: part, on all other samples.
        used: part, on the whole pool: the truth of the calibrations.
        predicted_ms: mean over the timed samples, simulated.
        ms: mean over the same samples at batch 1, measured.
    """

    policy: ExitPolicy
    proposed: float
    simulated: float
    decoded: float
    elsewhere: float
    used: float
    predicted_ms: float
    ms: float


@dataclass(frozen=True)
class Drawn:
    """What calibrations took, as places on the way from safe to bold; 0 is full depth.

    Args:
        ours: certified, ``[runs]``.
        usual: the usual way, ``[runs]``.
    """

    ours: np.ndarray
    usual: np.ndarray


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--cache", required=True, help="a folder for what was decoded, outside of the repository")
    parser.add_argument("--draws", type=int, default=200)
    args = parser.parse_args()
    task, promise = Task.load(args), Promise(args.metric, keep=args.keep)
    pool = Pool(task, args.cache)
    lines = measure(pool, promise, args)
    decoded = [pool(line.policy) for line in lines]
    clusters = len({c for c, proposes in zip(pool.clusters, pool.proposes, strict=True) if not proposes})
    write(task, pool, promise, lines, draw(decoded, promise, clusters, args.draws), clusters, args)


def measure(pool: Pool, promise: Promise, args: argparse.Namespace) -> list[Line]:
    """Propose, rehearse, go on beyond the promise; decode and time all of it."""
    simulated = propose(pool.trace, pool.latency, [promise])
    bold = [*simulated.worth_decoding, *_beyond(simulated)]
    rehearsed = rehearse(replace(simulated, worth_decoding=_distinct(bold)), pool.trace, pool.part(pool.proposes))
    way = [simulated.full_depth, *rehearsed.chain, *_beyond(rehearsed)]
    policies = {c.policy.to_json(): c.policy for c in way}
    places = np.unique(np.linspace(0, len(pool.trace) - 1, args.timed_samples).round().astype(int))
    timed = pool.trace.select(places)
    ms = pool.measured_ms(policies, timed.sample_ids, args.repeats)
    proposed = {c.policy.to_json(): c.used for c in [simulated.full_depth, *bold]}

    def line(text: str, policy: ExitPolicy) -> Line:
        guess, of_timed = (simulate(trace, policy, pool.latency) for trace in (pool.trace, timed))
        predicted = Decoded(pool.trace.sample_ids, pool.trace.clusters, guess.score, guess.same)
        full = Decoded(pool.trace.sample_ids, pool.trace.clusters, pool.trace.full_score, np.ones_like(guess.same))
        parts = [
            used(promise, decode(policy), decode(ExitPolicy.full_depth()))
            for decode in (pool.part(pool.proposes), pool.part(~pool.proposes), pool)
        ]
        return Line(policy, proposed[text], used(promise, predicted, full), *parts, float(of_timed.ms.mean()), ms[text])

    return [line(text, policy) for text, policy in track(policies.items(), "measuring")]


def used(promise: Promise, found: Decoded, full: Decoded) -> float:
    """Return the part of the allowed loss that a policy uses: 0 at full depth, above 1 the promise is broken."""
    start = mean_loss(promise, full, full)
    return (mean_loss(promise, found, full) - start) / (promise.tolerance - start)


def draw(decoded: list[Decoded], promise: Promise, clusters: int, runs: int) -> Drawn:
    """Calibrate on clusters drawn with replacement.

    Args:
        decoded: the pool under full depth and under each policy, from safe to bold.
        promise: to be kept.
        clusters: in each draw.
        runs: how many calibrations.
    """
    _, index = np.unique(np.asarray(decoded[0].clusters, dtype=str), return_inverse=True)
    rows_of = np.split(np.argsort(index, kind="stable"), np.cumsum(np.bincount(index))[:-1])
    rng, ours, theirs = np.random.default_rng(0), [], []
    for run in track(range(runs), "calibrations"):
        picked = [rows_of[k] for k in rng.integers(len(rows_of), size=clusters)]
        copy = [f"{i:06d}" for i, rows in enumerate(picked) for _ in rows]  # a cluster drawn twice is two
        names = [f"{cluster}/{i:06d}" for i, cluster in enumerate(copy)]
        rows = np.concatenate(picked)
        sample = [replace(taken(found, rows), sample_ids=names, clusters=copy) for found in decoded]
        ours.append(certified(promise, sample, run))
        theirs.append(usual(promise, sample))
    return Drawn(np.array(ours), np.array(theirs))


def write(
    task: Task,
    pool: Pool,
    promise: Promise,
    lines: list[Line],
    drawn: Drawn,
    clusters: int,
    args: argparse.Namespace,
) -> None:
    """Write both tables, and how often promises were broken into ``targets.json``."""
    where = f"{device()}, {args.threads} thread(s), torch {torch.__version__}"
    text = (
        f"# {task.name}: calibrations drawn from real decodes\n\n{where}; {today()}. Promise: {promise.in_words()}, at "
        f"{LEVEL:.0%} confidence. Pool: {len(pool.sample_ids):,} samples in {len(set(pool.clusters)):,} clusters that "
        f"trained nothing; {args.draws} calibrations on {clusters:,} clusters drawn with replacement, judged by the "
        "pool's mean. The usual way takes the boldest policy whose observed loss is within the tolerance.\n\n"
        f"{_drawn_table(lines, drawn)}\n\nPolicies from safe to bold, and how often each was taken. Parts are those of "
        "the allowed loss: above 1 the promise is broken. The search's has 1.645 standard errors added and counts no "
        f"gains. Time: batch 1, {args.timed_samples} of the samples that propose, {args.repeats} repeats, all in turn; "
        f"predicted from a latency table.\n\n{_lines_table(lines, drawn)}\n"
    )
    write_text(Path(__file__).parent / "results" / f"calibrations_{task.name}_{today()}.md", text)
    broken = float(np.mean([lines[k].used > 1 for k in drawn.ours]))
    unit = f"of {args.draws} calibrations drawn from a pool of real decodes"
    shown = argparse.Namespace(**vars(args) | {"cache": "FOLDER"})
    again = command(shown, "calibrations").replace("python -m calibrations", "python benchmarks/calibrations.py")
    note(f"{task.name}_calibrations_broken", broken, MAY_BREAK, "lower", unit, again, where)
    print(text)


def _drawn_table(lines: list[Line], drawn: Drawn) -> str:
    """Return what calibrations came to, ours and the usual way's."""
    part, saved = np.array([line.used for line in lines]), np.array([1 - line.ms / lines[0].ms for line in lines])
    best = saved[part <= 1].max()
    rows = [
        f"| {name} | {(part[taken] > 1).mean():.1%} | {part[taken].mean():.2f} | {(taken == 0).mean():.1%} | "
        f"{saved[taken].mean():.1%} | {saved[taken].mean() / saved[drawn.usual].mean():.2f} |"
        for name, taken in (("certified", drawn.ours), ("the usual way", drawn.usual))
    ]
    return (
        "| choice | promise broken | part of the allowed loss | full depth | time saved | of the usual way's |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: |\n"
        + "\n".join(rows)
        + f"\n\nWho knew the pool's mean would save {best:.1%}."
    )


def _lines_table(lines: list[Line], drawn: Drawn) -> str:
    """Return what was predicted of each policy, and what it really does."""
    rows = [
        f"| {in_words(line.policy)} | {(drawn.ours == i).mean():.0%} | {(drawn.usual == i).mean():.0%} | "
        f"{line.proposed:.2f} | {line.simulated:.2f} | {line.decoded:.2f} | {line.elsewhere:.2f} | "
        f"{line.predicted_ms:.2f} | {line.ms:.2f} | {line.predicted_ms / lines[0].predicted_ms:.3f} | "
        f"{line.ms / lines[0].ms:.3f} |"
        for i, line in enumerate(lines)
    ]
    return (
        "| policy | certified | usual | part: the search | simulated | decoded | decoded elsewhere | ms predicted | "
        "measured | of full depth: predicted | measured |\n"
        "| --- |" + " ---: |" * 10 + "\n" + "\n".join(rows)
    )


def _beyond(proposal: Proposal) -> list[Candidate]:
    """Return the fastest policies of the frontier that use no more than what is beyond the promise."""
    found = []
    for most in BEYOND:
        within = [c for c in proposal.frontier if c.used <= most and c.policy.rules]
        found += within[-1:]
    return [c for c in _distinct(found) if c not in proposal.chain]


def _distinct(candidates: list[Candidate]) -> list[Candidate]:
    return list({candidate.policy.to_json(): candidate for candidate in candidates}.values())


if __name__ == "__main__":
    main()
