"""Simulation: what a policy would do on the samples of a trace, without the model. A pure function.

Exact for the decoder while its tokens agree (just-in-time caches make states equal full-depth ones); vision and
encoder exits are taken one stream at a time from the trace and their effects added. It proposes, it never certifies.
What a trace cannot tell is refused: other K/V fills, thresholds that change with the step, signals of several exits.
Axes: ``n`` samples, ``T`` decoding steps, ``E`` exits of a stream; a *column* is an exit's index, ``E`` = full depth.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lightning_mue.latency import DecoderLatency, LatencyTable
from lightning_mue.policy import ExitPolicy, ExitRule
from lightning_mue.trace import StreamTrace, Trace


@dataclass(frozen=True)
class StreamOutcome:
    """What one stream's rule does when the other streams run at full depth.

    Args:
        depth: exit depth, ``[n]``, or ``[n, T]`` for the decoder (0 at steps not taken).
        same: bool ``[n]``, whether the output stays identical.
        change: estimated change of the metric score, float64 ``[n]``.
        ms: predicted milliseconds, float64 ``[n]``.
        pairs: (position, layer) pairs computed, int ``[n]``; 0 outside the decoder.
    """

    depth: np.ndarray
    same: np.ndarray
    change: np.ndarray
    ms: np.ndarray
    pairs: np.ndarray


@dataclass(frozen=True)
class Simulation:
    """What a policy would do on each sample of a trace.

    Args:
        depths: stream name -> exit depth, ``[n]``, or ``[n, T]`` for the decoder (0 at steps not taken).
        pairs: decoder (position, layer) pairs computed, int ``[n]``.
        same: bool ``[n]``, whether the output stays identical to full depth.
        score: estimated metric score, float64 ``[n]`` in [0, 1].
        ms: predicted milliseconds, float64 ``[n]``.
    """

    depths: dict[str, np.ndarray]
    pairs: np.ndarray
    same: np.ndarray
    score: np.ndarray
    ms: np.ndarray


def simulate(trace: Trace, policy: ExitPolicy, latency: LatencyTable) -> Simulation:
    """Predict what ``policy`` would do on every sample of ``trace``.

    Streams add up: the output stays identical if no stream changes it, and the score changes by the sum of the
    streams' changes, clipped to [0, 1]. Streams that the trace does not hold cost nothing here.

    Raises:
        ValueError: the policy names a stream, signal or layer the trace does not hold, it cannot be simulated, or costs
            were not measured.
    """
    if policy.kv_fill != "just-in-time":
        raise ValueError(f"`kv_fill={policy.kv_fill!r}` changes states and cannot be simulated; decode with the engine")
    unknown = sorted(set(policy.rules) - set(trace.streams))
    if unknown:
        raise ValueError(f"The policy has rules for streams {unknown}, the trace holds {sorted(trace.streams)}")
    outcomes = {name: simulate_stream(trace, name, policy.rules.get(name), latency) for name in sorted(trace.streams)}
    change, ms = np.zeros(len(trace)), np.zeros(len(trace))
    same, pairs = np.ones(len(trace), dtype=bool), np.zeros(len(trace), dtype=np.int64)
    for outcome in outcomes.values():
        change, ms = change + outcome.change, ms + outcome.ms
        same, pairs = same & outcome.same, pairs + outcome.pairs
    depths = {name: outcome.depth for name, outcome in outcomes.items()}
    return Simulation(depths, pairs, same, np.clip(trace.full_score + change, 0.0, 1.0), ms)


def simulate_stream(trace: Trace, name: str, rule: ExitRule | None, latency: LatencyTable) -> StreamOutcome:
    """Predict what ``rule`` alone would do to stream ``name``; None is full depth.

    Raises:
        ValueError: the rule does not fit the trace, cannot be simulated, or a cost was not measured.
    """
    _check_rule(name, rule)
    stream = trace.streams[name]
    thresholds = _thresholds(stream, name, rule)
    costs: Mapping[str, float]
    if stream.agree is not None:
        costs = latency.decoder.signal_ms
    elif name in latency.streams:
        costs = latency.streams[name].signal_ms
    else:
        raise ValueError(f"The latency table has no stream {name!r}, only {sorted(latency.streams)}; measure it again")
    signal_ms = _signal_cost(name, rule, costs)
    column = _exit_columns(stream, rule, thresholds)
    # exits tried up to and including the one taken; exits that can never be taken are not tried
    tried = np.append(np.cumsum(thresholds < np.inf), np.count_nonzero(thresholds < np.inf))[column]
    if stream.agree is not None:
        leaves = column < len(stream.layers)
        exit_ms = latency.decoder.exit_ms.get(rule.signal, 0.0) if rule is not None else 0.0
        return _decoder(trace, stream, column, tried * signal_ms + leaves * exit_ms, latency.decoder)
    cost = latency.streams[name]
    depth = np.append(np.asarray(stream.layers, dtype=np.int64), stream.num_layers)[column]
    rows = np.arange(len(trace))
    same = np.column_stack([stream.same_at, np.ones(len(trace), dtype=bool)])[rows, column]
    score = np.column_stack([stream.score_at, trace.full_score])[rows, column]
    ms = cost.fixed_ms + depth * cost.layer_ms + tried * signal_ms + (column < len(stream.layers)) * cost.exit_ms
    return StreamOutcome(depth, same, score - trace.full_score, ms, np.zeros(len(trace), dtype=np.int64))


def _decoder(
    trace: Trace, stream: StreamTrace, column: np.ndarray, signal_ms: np.ndarray, cost: DecoderLatency
) -> StreamOutcome:
    """Follow the decoder along its full-depth path; ``column`` and ``signal_ms`` are ``[n, T]``."""
    assert stream.agree is not None
    n, steps = column.shape
    taken = np.arange(steps) < trace.lengths[:, None]
    layers = np.append(np.asarray(stream.layers, dtype=np.int64), stream.num_layers)
    depth = np.where(taken, layers[column], 0)
    agree = np.concatenate([stream.agree, np.ones((n, steps, 1), dtype=bool)], axis=2)
    differs = taken & ~np.take_along_axis(agree, column[..., None], axis=2)[..., 0]
    changed = differs.any(axis=1)
    rows = np.arange(n)
    at_change = column[rows, differs.argmax(axis=1)] if steps else np.full(n, len(stream.layers))
    score = np.column_stack([stream.score_at, trace.full_score])[rows, at_change]
    change = np.where(changed, score - trace.full_score, 0.0)
    ms, pairs = _just_in_time(depth, stream.num_layers, cost, trace.prompts)
    ms += (taken * (cost.step_ms + signal_ms)).sum(axis=1)
    return StreamOutcome(depth, ~changed, change, ms, pairs)


def _just_in_time(
    depth: np.ndarray, num_layers: int, cost: DecoderLatency, prompts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ms of all layers run and the (position, layer) pairs computed, each ``[n]``.

    A layer reached at step t takes all positions it has not seen yet, in one block (DEED): at first those of the
    decoder prompt too.
    """
    n, steps = depth.shape
    after = prompts[:, None] + np.arange(1, steps + 1)  # positions, once a step has run
    block_ms = cost.layer_cost(np.arange(prompts.max(initial=0) + steps + 1))
    ms, pairs = np.zeros(n), np.zeros(n, dtype=np.int64)
    for layer in range(1, num_layers + 1):
        reached = depth >= layer
        seen = np.maximum.accumulate(np.where(reached, after, 0), axis=1)  # positions whose K/V the layer has
        pending = np.diff(seen, axis=1, prepend=0)
        ms += block_ms[pending].sum(axis=1) + cost.cross_ms * reached.any(axis=1)  # projected when first reached
        pairs += seen[:, -1] if steps else 0
    return ms, pairs


def _check_rule(name: str, rule: ExitRule | None) -> None:
    """Refuse what one exit's score in one full-depth pass does not decide."""
    if rule is None:
        return
    if rule.decay is not None or rule.from_step:
        asked = "`decay` and `from_step` change thresholds with the step"
    elif rule.signal in ("patience", "flat_similarity"):
        asked = f"signal {rule.signal!r} is no score of one exit and one sample"
    else:
        return
    raise ValueError(f"The rule of stream {name!r} cannot be simulated: {asked}; decode with the engine")


def _thresholds(stream: StreamTrace, name: str, rule: ExitRule | None) -> np.ndarray:
    """Return the rule's threshold at each of the trace's exits, float64 ``[E]``, inf where it has none."""
    thresholds = np.full(len(stream.layers), np.inf)
    if rule is None:
        return thresholds
    for layer, threshold in zip(rule.layers, rule.thresholds, strict=True):
        if layer in stream.layers:
            thresholds[stream.layers.index(layer)] = threshold
        elif layer != stream.num_layers:  # an exit after the last layer is full depth
            raise ValueError(
                f"The policy leaves stream {name!r} after layer {layer}; the trace has exits after "
                f"{list(stream.layers)} and {stream.num_layers} layers. Collect a trace with that exit"
            )
    return thresholds


def _signal_cost(name: str, rule: ExitRule | None, costs: Mapping[str, float]) -> float:
    if rule is None or rule.signal == "static":
        return 0.0
    if rule.signal not in costs:
        raise ValueError(
            f"The latency table has no cost of signal {rule.signal!r} in stream {name!r}, only {sorted(costs)}; "
            "measure it again"
        )
    return costs[rule.signal]


def _exit_columns(stream: StreamTrace, rule: ExitRule | None, thresholds: np.ndarray) -> np.ndarray:
    """Return the column at which each sample (or step) leaves, int ``[n]`` or ``[n, T]``."""
    shape = stream.score_at.shape[:1] if stream.agree is None else stream.agree.shape[:2]
    if rule is None or rule.signal == "static":
        first = int(np.argmax(np.append(thresholds <= 1.0, True)))
        return np.full(shape, first)
    if rule.signal not in stream.scores:
        raise ValueError(f"The policy reads signal {rule.signal!r}, the trace holds {sorted(stream.scores)}")
    scores = stream.scores[rule.signal]
    # a threshold has the scores' precision in the engine (a float32 tensor compared with a number), so here too
    leaves = scores >= thresholds.astype(scores.dtype)
    last = np.ones((*shape, 1), dtype=bool)
    return np.concatenate([leaves, last], axis=-1).argmax(axis=-1)
