"""The streams before the decoder at inference: every sample leaves at its own layer; rows are compacted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lightning_mue.backbones import Backbone, EncoderStream, StreamState
from lightning_mue.backbones.stream import Inputs
from lightning_mue.exits import Exits
from lightning_mue.inference.stopwatch import Stopwatch
from lightning_mue.policy import ExitRule
from lightning_mue.signals import flat_similarity, similarity

OnExit = Callable[[str, int, StreamState, Tensor], None]
"""Called at each exit passed, with stream, layer, state and the states before the layer (to record, not to change)."""


@dataclass
class Encoded:
    """The decoder's memory and what the streams did.

    Args:
        memory_BSD: what the decoder reads.
        depths: stream name -> exit depth of each sample, int64 ``[B]``.
        layer_runs: stream name -> layer executions (calls).
    """

    memory_BSD: Tensor
    depths: dict[str, Tensor]
    layer_runs: dict[str, int]


def encode(
    backbone: Backbone,
    exits: Exits | None,
    inputs: Inputs,
    rules: Mapping[str, ExitRule],
    stopwatch: Stopwatch,
    on_exit: OnExit | None = None,
    streams: Sequence[EncoderStream] | None = None,
) -> Encoded:
    """Run all streams before the decoder under their rules; a stream without a rule runs at full depth.

    ``streams`` are the backbone's, run by something else; its own if not given.
    """
    outputs: dict[str, Tensor] = {}
    depths: dict[str, Tensor] = {}
    layer_runs: dict[str, int] = {}
    for stream in backbone.encoders if streams is None else streams:
        with stopwatch.part(stream.name):
            state = stream.prologue(inputs, outputs)
            branch = StateBranch(stream.name, exits)
            h_BTD, depth_B, runs = climb(stream, branch, state.at(state.h_BTD), rules.get(stream.name), on_exit)
            outputs[stream.name] = stream.epilogue(state.at(h_BTD))
        depths[stream.name], layer_runs[stream.name] = depth_B, runs
    return Encoded(backbone.memory(outputs), depths, layer_runs)


def stream_scores(
    exits: Exits | None, signal: str, stream: str, k: int, state: StreamState, before_BTD: Tensor
) -> Tensor:
    """Return the exit scores ``[B]`` of a stream left once per sample."""
    if signal == "similarity":
        return similarity(state.h_BTD, before_BTD, state.valid_BT)
    if signal == "flat_similarity":
        return flat_similarity(state.h_BTD, before_BTD)
    if signal == "gate":
        assert exits is not None
        return exits.gate_logit(stream, k, state.h_BTD, state.valid_BT).float().sigmoid()
    return torch.ones(state.h_BTD.shape[0], device=state.h_BTD.device)


class Branch(Protocol):
    """What leaving a stream gives, and the scores that say whether to."""

    def scores(self, signal: str, k: int, state: StreamState, before_BTD: Tensor) -> Tensor:
        """Return the exit scores ``[B]`` after layer ``k``."""

    def left(self, k: int, state: StreamState, leaves_B: Tensor | None = None) -> Tensor:
        """Return what the rows of ``leaves_B`` (all if None) give that leave after layer ``k``, ``[R, ...]``.

        If any were asked about this state, ``scores`` was called with it last.
        """


@dataclass(frozen=True)
class StateBranch:
    """Leaving gives states ``[R, T, D]``, as the adapter makes them for what follows the stream."""

    stream: str
    exits: Exits | None

    def scores(self, signal: str, k: int, state: StreamState, before_BTD: Tensor) -> Tensor:
        """Return the exit scores ``[B]`` after layer ``k``."""
        return stream_scores(self.exits, signal, self.stream, k, state, before_BTD)

    def left(self, k: int, state: StreamState, leaves_B: Tensor | None = None) -> Tensor:
        """Return the states of rows that leave after layer ``k``."""
        left_RTD = state.h_BTD if leaves_B is None else state.h_BTD[leaves_B]
        return left_RTD if self.exits is None else self.exits.adapt(self.stream, k, left_RTD)


def climb(
    stream: EncoderStream,
    branch: Branch,
    state: StreamState,
    rule: ExitRule | None,
    on_exit: OnExit | None = None,
) -> tuple[Tensor, Tensor, int]:
    """Run a stream's layers; every sample leaves at its own.

    Args:
        stream: whose layers they are.
        branch: what leaving gives, and whether to.
        state: that enters layer 1; it is changed.
        rule: when to leave; None: never early.
        on_exit: called at each layer passed.

    Returns:
        What leaving gave, ``[B, ...]``, the depths ``[B]`` and the number of layer calls.
    """
    batch = len(state.h_BTD)
    depths = torch.full((batch,), stream.num_layers, device=state.h_BTD.device)
    rows = torch.arange(batch, device=state.h_BTD.device)
    result: Tensor | None = None
    for k in range(1, stream.num_layers + 1):
        before_BTD = state.h_BTD
        state.h_BTD = stream.layer(k, state)
        if on_exit is not None:
            on_exit(stream.name, k, state, before_BTD)
        threshold = rule.reachable.get(k) if rule is not None else None
        if rule is None or threshold is None:
            continue
        leaves = branch.scores(rule.signal, k, state, before_BTD) >= threshold
        count = int(leaves.sum())
        if count == 0:
            continue
        left = branch.left(k, state, None if count == len(leaves) else leaves)
        depths[rows[leaves]] = k
        if count == batch:
            return left, depths, k
        result = left.new_empty((batch, *left.shape[1:])) if result is None else result
        result[rows[leaves]] = left
        if count == len(leaves):
            return result, depths, k
        stay = (~leaves).nonzero()[:, 0]
        rows, state = rows[stay], state.rows(stay)
    last = branch.left(stream.num_layers, state)
    if result is None:
        return last, depths, stream.num_layers
    result[rows] = last
    return result, depths, stream.num_layers
