"""Simulation: what a policy would do on the samples of a trace, without the model. A pure function.

Exact for the decoder while its tokens agree (just-in-time caches make states equal full-depth ones); vision and
encoder exits are taken one stream at a time from the trace and their effects added. It proposes, it never certifies.
What a trace cannot tell is refused: other K/V fills, signals of several exits.
Axes: ``n`` samples, ``m`` rows (`StreamRows`), ``E`` exits; a *column* is an exit's index, ``E`` = full depth.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lightning_mue.calibration.cost import deciding_ms, just_in_time, stream_ms
from lightning_mue.calibration.rows import StreamRows
from lightning_mue.latency import LatencyTable
from lightning_mue.policy import ExitPolicy, ExitRule
from lightning_mue.promise import RANGES
from lightning_mue.trace import Trace


@dataclass(frozen=True)
class StreamOutcome:
    """What one stream's rule does when the other streams run at full depth.

    Args:
        depth: exit depth of each row, int ``[m]``.
        same: bool ``[n]``, whether the output stays identical.
        change: metric -> estimated change of the score, float64 ``[n]``.
    """

    depth: np.ndarray
    same: np.ndarray
    change: dict[str, np.ndarray]


@dataclass(frozen=True)
class Simulation:
    """What a policy would do on each sample of a trace.

    Args:
        depths: stream name -> exit depth, ``[n]``, or ``[n, T]`` for the decoder (0 at steps not taken).
        pairs: decoder (position, layer) pairs computed, int ``[n]``.
        same: bool ``[n]``, whether the output stays identical to full depth.
        score: metric -> estimated score, float64 ``[n]``.
        ms: predicted milliseconds, float64 ``[n]``.
    """

    depths: dict[str, np.ndarray]
    pairs: np.ndarray
    same: np.ndarray
    score: dict[str, np.ndarray]
    ms: np.ndarray


def simulate(trace: Trace, policy: ExitPolicy, latency: LatencyTable) -> Simulation:
    """Predict what ``policy`` would do on every sample of ``trace``.

    Streams add up: the output stays identical if no stream changes it, and the score changes by the sum of the
    streams' changes, clipped to the metric's range. Streams that the trace does not hold cost nothing here.

    Raises:
        ValueError: the policy names a stream, signal or layer the trace does not hold, it cannot be simulated, or costs
            were not measured.
    """
    if policy.kv_fill != "just-in-time":
        raise ValueError(f"`kv_fill={policy.kv_fill!r}` changes states and cannot be simulated; decode with the engine")
    if policy.verified:
        raise ValueError("A verified policy answers as full depth does; there is nothing to simulate")
    unknown = sorted(set(policy.rules) - set(trace.streams))
    if unknown:
        raise ValueError(f"The policy has rules for streams {unknown}, the trace holds {sorted(trace.streams)}")
    same, ms, pairs = np.ones(len(trace), dtype=bool), np.zeros(len(trace)), np.zeros(len(trace), dtype=np.int64)
    depths, changes = {}, []
    for name in sorted(trace.streams):
        rows = StreamRows.of(trace, name)
        outcome = stream_outcome(rows, policy.rules.get(name))
        stream_ms, stream_pairs = stream_cost(rows, policy.rules.get(name), latency)
        same, ms, pairs = same & outcome.same, ms + stream_ms, pairs + stream_pairs
        changes.append(outcome.change)
        depths[name] = outcome.depth
        if (agree := trace.streams[name].agree) is not None:
            depths[name] = np.zeros(agree.shape[:2], dtype=np.int64)
            depths[name][rows.sample, rows.step] = outcome.depth
    return Simulation(depths, pairs, same, changed_scores(trace, changes), ms)


def changed_scores(trace: Trace, changes: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return metric -> score of each sample, ``[n]``, when all streams' changes add up."""
    return {
        metric: np.clip(sum((change[metric] for change in changes), full), 0.0, RANGES[metric])
        for metric, full in trace.full_score.items()
    }


def stream_outcome(rows: StreamRows, rule: ExitRule | None) -> StreamOutcome:
    """Predict what ``rule`` alone would do to a stream's outputs; None is full depth.

    Raises:
        ValueError: the rule does not fit the trace or cannot be simulated.
    """
    column = _leave(rows, rule)
    changed_at = _first_harm(rows, column)
    change = {m: score[changed_at, np.arange(rows.samples)] - score[-1] for m, score in rows.score_at.items()}
    return StreamOutcome(_depths(rows)[column], changed_at == len(rows.layers), change)


def stream_cost(rows: StreamRows, rule: ExitRule | None, latency: LatencyTable) -> tuple[np.ndarray, np.ndarray]:
    """Return the milliseconds of a stream under ``rule``, and the decoder's (position, layer) pairs, each ``[n]``.

    Raises:
        ValueError: the rule does not fit the trace or cannot be simulated, or a cost was not measured.
    """
    column, depths = _leave(rows, rule), _depths(rows)
    deciding = deciding_ms(latency, rows.name, rule, depths, rows.num_layers)
    if not rows.is_decoder:
        ms = (stream_ms(latency, rows.name, depths) + deciding)[column]
        return ms, np.zeros(rows.samples, dtype=np.int64)
    each = deciding[column]
    if rule is not None and rule.from_step:
        each[rows.step < rule.from_step] = 0.0
    where = (depths[column], rows.sample, rows.position, depths.tolist(), rows.samples)
    ms, pairs = just_in_time(latency.decoder, *where)
    return ms + np.bincount(rows.sample, each + latency.decoder.step_ms, rows.samples), pairs


def _depths(rows: StreamRows) -> np.ndarray:
    """Return the depth of each column, int16 ``[E + 1]``."""
    return np.array((*rows.layers, rows.num_layers), dtype=np.int16)


def _leave(rows: StreamRows, rule: ExitRule | None) -> np.ndarray:
    """Return the column at which each row leaves, int8 ``[m]``."""
    column = np.full(len(rows.sample), len(rows.layers), dtype=np.int8)
    if rule is None:
        return column
    _check_rule(rows, rule)
    for e, layer in reversed(list(enumerate(rows.layers))):
        if layer in rule.reachable:
            scores = np.float32(1.0) if rule.signal == "static" else rows.scores[rule.signal][e]
            # a threshold has the scores' precision in the engine (a float32 tensor compared with a number), so here too
            np.copyto(column, np.int8(e), where=scores >= _thresholds(rows, rule, layer).astype(np.float32))
    return column


def _thresholds(rows: StreamRows, rule: ExitRule, layer: int) -> np.ndarray:
    """Return the rule's threshold at an exit, for every row or one for all."""
    if rule.decay is None and not rule.from_step:
        return np.array(rule.reachable[layer])
    if not rows.steps:
        raise ValueError(
            f"The rule of stream {rows.name!r} cannot be simulated: its thresholds change with the step, and the trace "
            "does not say how long answers may be"
        )
    at = [rule.thresholds_at(step, rows.steps).get(layer, math.inf) for step in range(rows.steps)]
    return np.array(at)[rows.step]


def _first_harm(rows: StreamRows, column: np.ndarray) -> np.ndarray:
    """Return the column at which each sample's output first differs, int ``[n]``: ``E`` if it never does."""
    harmed = np.zeros(len(column), dtype=bool)
    for e, harm in enumerate(rows.harm):
        harmed |= (column == e) & harm
    where = np.flatnonzero(harmed)
    first = np.diff(rows.sample[where], prepend=-1) > 0
    changed_at = np.full(rows.samples, len(rows.layers))
    changed_at[rows.sample[where[first]]] = column[where[first]]
    return changed_at


def _check_rule(rows: StreamRows, rule: ExitRule) -> None:
    """Refuse what one exit's score in one full-depth pass does not decide, and what the trace does not hold."""
    if rule.signal in ("patience", "flat_similarity"):
        raise ValueError(
            f"The rule of stream {rows.name!r} cannot be simulated: signal {rule.signal!r} is no score of one exit and "
            "one sample; decode with the engine"
        )
    if rule.signal != "static" and rule.signal not in rows.scores:
        raise ValueError(f"The policy reads signal {rule.signal!r}, the trace holds {sorted(rows.scores)}")
    exits = (*rows.layers, rows.num_layers)  # an exit after the last layer is full depth
    if unknown := sorted(set(rule.layers) - set(exits)):
        raise ValueError(
            f"The policy leaves stream {rows.name!r} after layer {unknown[0]}; the trace has exits after "
            f"{list(rows.layers)} and {rows.num_layers} layers. Collect a trace with that exit"
        )
