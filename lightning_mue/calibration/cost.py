"""What leaving early costs: from a measured latency table and the depths at which streams are left, to milliseconds.

One sample at a time, as the table was measured. What a policy does is not asked here: depths are simulated, forced, or
those of a decode (``ExitOutput.exit_depths``). Axes: ``n`` samples, ``m`` tokens of all samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from lightning_mue.latency import DecoderLatency, LatencyTable, StreamLatency
from lightning_mue.policy import ExitRule


def predicted_ms(
    latency: LatencyTable,
    depths: Mapping[str, np.ndarray],
    rules: Mapping[str, ExitRule] | None = None,
    prompts: np.ndarray | int = 0,
) -> dict[str, np.ndarray]:
    """Return stream name -> milliseconds of each sample, ``[n]``, decoded alone and with just-in-time K/V.

    Args:
        latency: measured costs.
        depths: stream name -> exit depths, ``[n]``, or ``[n, T]`` for the decoder (0 at steps not taken).
        rules: which signals were asked where. Of a stream without a rule none was, and its exits have no adapters.
        prompts: tokens of the decoder prompts, ``[n]`` or of each.

    Raises:
        ValueError: a cost was not measured.
    """
    found = {}
    for name, depth in depths.items():
        depth, rule = np.asarray(depth), (rules or {}).get(name)
        if name != "decoder":
            found[name] = stream_ms(latency, name, depth) + deciding_ms(latency, name, rule, depth)
            continue
        sample, step = np.nonzero(depth)
        taken, position = depth[sample, step], np.broadcast_to(prompts, len(depth))[sample] + step + 1
        ms, _ = just_in_time(latency.decoder, taken, sample, position, np.unique(taken).tolist(), len(depth))
        deciding = deciding_ms(latency, name, rule, taken)
        if rule is not None:
            deciding[step < rule.from_step] = 0.0
        found[name] = ms + np.bincount(sample, latency.decoder.step_ms + deciding, len(depth))
    return found


def stream_ms(latency: LatencyTable, name: str, depth: np.ndarray) -> np.ndarray:
    """Return the ms of a stream that is left once per sample, at these depths.

    Raises:
        ValueError: they were not measured.
    """
    cost = _cost(latency, name)
    assert isinstance(cost, StreamLatency)
    return cost.fixed_ms + depth * cost.layer_ms


def deciding_ms(
    latency: LatencyTable, name: str, rule: ExitRule | None, depth: np.ndarray, full: float = math.inf
) -> np.ndarray:
    """Return what is paid for the decision to leave at these depths, of their shape.

    All exits below the last layer, ``full``, are asked up to the one taken, whose branch is run; those that can never
    be taken are not asked.

    Raises:
        ValueError: the cost of the rule's signal was not measured.
    """
    if rule is None:
        return np.zeros(depth.shape)
    cost, exits = _cost(latency, name), [k for k in rule.reachable if k < full]
    if rule.signal != "static" and rule.signal not in cost.signal_ms:
        raise ValueError(
            f"The latency table has no cost of signal {rule.signal!r} in stream {name!r}, only "
            f"{sorted(cost.signal_ms)}; measure it again"
        )
    if isinstance(cost, StreamLatency):
        exit_ms = cost.exit_ms_of.get(rule.signal, cost.exit_ms)
    else:
        exit_ms = cost.exit_ms.get(rule.signal, 0.0)
    asked = np.searchsorted(exits, depth, side="right")
    return asked * cost.signal_ms.get(rule.signal, 0.0) + np.isin(depth, exits) * exit_ms


def just_in_time(
    cost: DecoderLatency,
    depth: np.ndarray,
    sample: np.ndarray,
    position: np.ndarray,
    levels: Sequence[int],
    samples: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ms of all layers that run, and the (position, layer) pairs that they compute, each ``[n]``.

    A layer reached at a step takes all positions that it has not seen yet, in one block (DEED): at first those of the
    decoder prompt too, and it projects its cross-attention K/V.

    Args:
        cost: of the decoder.
        depth: of each token, ``[m]``.
        sample: whose token it is, ``[m]``, rising.
        position: positions of the decoder, its prompt among them, once the token's step has run, ``[m]``.
        levels: all depths that may occur, rising.
        samples: how many there are.
    """
    block_sizes, base = np.arange(position.max(initial=0) + 1), cost.base_layers
    block_ms = cost.layer_cost(block_sizes)
    base_ms = cost.layer_cost(block_sizes, base=True) if base else np.zeros(1)
    ms, pairs, below = np.zeros(samples), np.zeros(samples, dtype=np.int64), 0
    for level in levels:  # the layers between two of them are run by the same tokens
        if below:
            reached = depth > below
            depth, sample, position = depth[reached], sample[reached], position[reached]
        starts, ends = (np.flatnonzero(np.diff(sample, **at)) for at in ({"prepend": -1}, {"append": -1}))
        pending = np.diff(position, prepend=0)
        pending[starts] = position[starts]
        upper, lower = max(0, level - max(below, base)), max(0, min(level, base) - below)
        ms += upper * np.bincount(sample, block_ms[pending], samples)
        ms += np.bincount(sample, lower * base_ms[pending], samples) if lower else 0.0
        ms[sample[starts]] += upper * cost.cross_ms
        pairs[sample[ends]] += (level - below) * position[ends]
        below = level
    return ms, pairs


def _cost(latency: LatencyTable, name: str) -> StreamLatency | DecoderLatency:
    if name == "decoder":
        return latency.decoder
    if name not in latency.streams:
        raise ValueError(f"The latency table has no stream {name!r}, only {sorted(latency.streams)}; measure it again")
    return latency.streams[name]
