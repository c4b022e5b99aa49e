"""Proposing: from a trace and a latency table to a short chain of policies, from safe to bold.

Nothing here carries a promise: simulation errors cost speed, the certificate comes from real decoding (`certify`).
Pareto testing (Laufer-Goldshtein et al. 2023): search on this data, order the frontier, test it on other data.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lightning_mue.calibration.candidates import DIGITS, Candidate, Judge, chain_of, frontier_of
from lightning_mue.calibration.dials import stream_options
from lightning_mue.calibration.frontier import pareto, peel
from lightning_mue.calibration.rows import StreamRows
from lightning_mue.calibration.simulate import changed_scores, stream_cost, stream_outcome
from lightning_mue.calibration.worth import exits_that_pay
from lightning_mue.latency import LatencyTable
from lightning_mue.policy import ExitPolicy, ExitRule, chain_hash
from lightning_mue.promise import Promise
from lightning_mue.trace import Trace

FEWER = 6
"""Combinations of fewer streams that are decoded beside the chain before it is fixed; as many of static depths."""

BOLD = 2.0
"""Static depths are decoded up to so many times the allowed loss as predicted: they cost nothing to decide, and where
streams do the same harm, which simulation counts twice, they may be all that is needed."""

TIMED = 2000
"""Samples, evenly spaced, on which times are predicted: a mean of so many is surer than the latency table's figures."""


@dataclass(frozen=True)
class Proposal:
    """What to test, and what it was chosen from.

    Args:
        chain: at most 8 candidates, rising risk and falling ms, each faster than full depth; fixed before the
            certify split is seen.
        frontier: candidates that no other beats in both predicted risk and ms, from safe to bold.
        statics: full depth first, then every static depth of each single stream; for the report.
        worth_decoding: the chain, the best of fewer streams, and of static depths; for `rehearse`.
        searched: how many policies it was chosen from.
        refused: exits that cannot save time even if everything leaves there, each in words; they were not tried.
        promises: that it was made for.
        groups: of samples that they are about in turn; None: all samples.
    """

    chain: list[Candidate]
    frontier: list[Candidate]
    statics: list[Candidate]
    worth_decoding: list[Candidate]
    searched: int
    refused: tuple[str, ...]
    promises: tuple[Promise, ...]
    groups: tuple[str, ...] | None

    @property
    def full_depth(self) -> Candidate:
        """The plain model on the same samples."""
        return self.statics[0]

    @property
    def chain_hash(self) -> str:
        """The hash of the chain's policies, to be stored before the first of them is tested."""
        return chain_hash([candidate.policy for candidate in self.chain])


@dataclass(frozen=True)
class _Option:
    """One rule of one stream and what it does: to each sample, ``[n]``, and in the mean.

    ``risk`` (the part used of the allowed loss) and ``ms`` are its shares of the sums over streams.
    """

    rule: ExitRule | None
    same: np.ndarray
    change: dict[str, np.ndarray]
    risk: float
    ms: float
    depth: float


def propose(
    trace: Trace,
    latency: LatencyTable,
    promises: Sequence[Promise],
    groups: Sequence[str] | None = None,
    dials: int = 12,
    survivors: int = 300,
) -> Proposal:
    """Search policies by simulation and order the best as a chain.

    Every stream has options: full depth, each static depth, each signal at ``dials`` dials. Risks and times of streams
    add, which prunes the product; the survivors are then evaluated sample by sample. The same trace and latency give
    the same policy bytes, whatever the order of samples, shards or repeats.

    Args:
        trace: full-depth pass over the propose split.
        latency: measured costs.
        promises: what a policy has to keep, all of them.
        groups: keep them in each of these groups of samples; no others are looked at. None: over all samples.
        dials: dials per signal, spaced geometrically from 1/30 of the tolerance to 1/2.
        survivors: how many combinations are evaluated exactly, at least.

    Raises:
        ValueError: a trace without the scores of a promise, or costs that were not measured.
    """
    trace = of_groups(Trace.merge([trace]), groups)  # in order of sample id, without repeats
    if missing := {promise.metric for promise in promises} - {*trace.full_score, "consistency"}:
        raise ValueError(
            f"The trace holds scores of {sorted(trace.full_score)}, the promise is about {min(missing)!r}; collect it "
            "again"
        )
    judge = Judge(trace, promises, groups)
    gammas = np.geomspace(min(map(_slack, promises)) / 30, 0.5, dials)
    options, refused = _all_options(trace, latency, gammas, judge)
    full, combinations = _combinations(options, survivors)

    def evaluated(choices: Sequence[dict[str, _Option]]) -> list[Candidate]:
        return [_evaluate(trace, choice, judge, groups) for choice in choices]

    statics = evaluated(_statics(options, full))
    frontier = frontier_of([*evaluated(combinations), *statics])
    chain, few = chain_of(frontier, statics[0].ms), evaluated(_fewer_streams(options, full, 0.5))
    bold = [c for c in evaluated(_static_depths(options)) if c.used <= BOLD and c.policy.rules]
    worth_decoding = list({c.policy.to_json(): c for c in (*chain, *few, *bold[:FEWER])}.values())
    searched = math.prod(map(len, options.values()))
    return Proposal(chain, frontier, statics, worth_decoding, searched, refused, tuple(promises), _names(groups))


def timed_samples(trace: Trace) -> Trace:
    """Return the samples on which times are predicted: ``TIMED`` of them, evenly spaced."""
    return trace.select(np.unique(np.linspace(0, len(trace) - 1, min(len(trace), TIMED)).round().astype(np.int64)))


def of_groups(trace: Trace, groups: Sequence[str] | None) -> Trace:
    """Return the samples of these groups; all if None."""
    return trace if groups is None else trace.select(np.isin(np.asarray(trace.groups, dtype=str), list(groups)))


def _names(groups: Sequence[str] | None) -> tuple[str, ...] | None:
    return None if groups is None else tuple(sorted(groups))


def _slack(promise: Promise) -> float:
    """Return the share of a perfect model's score that may be lost."""
    return promise.tolerance if promise.keep is None else 1 - promise.keep


def _all_options(
    trace: Trace, latency: LatencyTable, gammas: np.ndarray, judge: Judge
) -> tuple[dict[str, list[_Option]], tuple[str, ...]]:
    """Return the options of every stream, and in words the exits that are none."""
    timed, options, refused = timed_samples(trace), {}, list[str]()
    for name in sorted(trace.streams):
        timed_rows = StreamRows.of(timed, name)
        exits, words = exits_that_pay(timed_rows, latency)
        options[name] = _options(StreamRows.of(trace, name), timed_rows, latency, gammas, exits, trace, judge)
        refused += words
    return options, tuple(refused)


def _options(
    rows: StreamRows,
    timed: StreamRows,
    latency: LatencyTable,
    gammas: np.ndarray,
    exits: Mapping[str, Sequence[int]],
    trace: Trace,
    judge: Judge,
) -> list[_Option]:
    """Return every rule of a stream with what it does alone; ``timed`` are the rows of the samples that are timed."""
    options = []
    for rule in stream_options(rows, gammas, exits):
        outcome, (ms, _) = stream_outcome(rows, rule), stream_cost(timed, rule, latency)
        risk = judge.used(changed_scores(trace, [outcome.change]), outcome.same)
        depth = float(outcome.depth.mean()) if len(outcome.depth) else 0.0
        options.append(_Option(rule, outcome.same, outcome.change, risk, float(ms.mean()), depth))
    return options


def _combinations(
    options: dict[str, list[_Option]], survivors: int
) -> tuple[dict[str, _Option], list[dict[str, _Option]]]:
    """Return full depth in every stream, and the combinations whose summed risk and ms are worth a closer look.

    An option that another of its stream beats in both sums is beaten in every combination, so only frontiers multiply.
    """
    full = {name: of_stream[0] for name, of_stream in options.items()}
    grid, risk, ms = _grid([_front(of_stream) for of_stream in options.values()])
    return full, [dict(zip(options, grid[i], strict=True)) for i in peel(risk, ms, survivors)]


def _fewer_streams(
    options: dict[str, list[_Option]], full: dict[str, _Option], risk_at_most: float
) -> list[dict[str, _Option]]:
    """Return, of every choice of fewer streams, the fastest combination within a risk; the fastest ``FEWER`` of these.

    Where streams harm each other, the best of all streams together are not safe; these are.
    """
    fronts = {name: [o for o in _front(of_stream) if o.rule is not None] for name, of_stream in options.items()}
    found: list[tuple[float, dict[str, _Option]]] = []
    for size in range(1, len(options)):
        for names in itertools.combinations([name for name, front in fronts.items() if front], size):
            grid, risk, ms = _grid([fronts[name] for name in names])
            if (within := np.flatnonzero(risk <= risk_at_most)).size:
                best = within[np.argmin(ms[within])]
                choice = full | dict(zip(names, grid[best], strict=True))
                found.append((sum(option.ms for option in choice.values()), choice))
    found.sort(key=lambda pair: pair[0])
    return [choice for _, choice in found[:FEWER]]


def _static_depths(options: dict[str, list[_Option]]) -> list[dict[str, _Option]]:
    """Return the combinations of static depths that no other beats in summed risk and ms, from fast to slow."""
    fixed = [[o for o in of_stream if o.rule is None or o.rule.signal == "static"] for of_stream in options.values()]
    grid, risk, ms = _grid(fixed)
    front = sorted(pareto(risk, ms), key=ms.__getitem__)
    return [dict(zip(options, grid[i], strict=True)) for i in front]


def _front(of_stream: list[_Option]) -> list[_Option]:
    risk, ms = (np.round([getattr(o, what) for o in of_stream], DIGITS) for what in ("risk", "ms"))
    return [of_stream[i] for i in pareto(risk, ms)]


def _grid(fronts: list[list[_Option]]) -> tuple[list[tuple[_Option, ...]], np.ndarray, np.ndarray]:
    """Return all combinations with their summed risk and ms."""
    grid = list(itertools.product(*fronts))
    risk, ms = (np.round([sum(getattr(o, what) for o in choice) for choice in grid], DIGITS) for what in ("risk", "ms"))
    return grid, risk, ms


def _statics(options: dict[str, list[_Option]], full: dict[str, _Option]) -> list[dict[str, _Option]]:
    """Return full depth, then each static depth of each stream with the others at full depth."""
    choices = [full]
    for name, of_stream in options.items():
        choices += [full | {name: o} for o in of_stream if o.rule is not None and o.rule.signal == "static"]
    return choices


def _evaluate(trace: Trace, choice: dict[str, _Option], judge: Judge, groups: Sequence[str] | None) -> Candidate:
    """Return the candidate with the risk of its actual outcomes, sample by sample (as `simulate` joins them)."""
    same = np.ones(len(trace), dtype=bool)
    for option in choice.values():
        same = same & option.same
    score = changed_scores(trace, [option.change for option in choice.values()])
    rules = {name: option.rule for name, option in choice.items() if option.rule is not None}
    depths = {name: option.depth for name, option in choice.items()}
    made_of, classes = trace.meta.get("fingerprint"), tuple(trace.meta.get("classes", ()))
    policy = ExitPolicy(rules, groups=_names(groups), fingerprint=made_of, classes=classes)
    return judge.candidate(policy, score, same, sum(option.ms for option in choice.values()), depths)
