"""The supervised pass: teacher-forced, every decoder exit, streams left at a given depth. Pure tensor functions.

Shapes: ``B`` batch, ``T`` target positions, ``D`` width, ``N`` target tokens that count (padding left out).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.utils.checkpoint import checkpoint

from lightning_mue.backbones import Backbone
from lightning_mue.backbones.stream import Inputs, causal_mask
from lightning_mue.exits import Exits

IGNORE = -100


@dataclass
class StreamStates:
    """What the gates of a stream learn from: detached states at each exit that was passed."""

    at_exit: dict[int, Tensor]
    valid_BT: Tensor | None


@dataclass
class ExitResult:
    """One decoder exit on one batch: mean cross-entropy and the tokens it would choose, ``[N]``."""

    loss: Tensor
    tokens_N: Tensor


def encode(
    backbone: Backbone, exits: Exits, inputs: Inputs, depths: Mapping[str, int]
) -> tuple[Tensor, dict[str, StreamStates]]:
    """Run the streams before the decoder, each left after ``depths[name]`` layers (full depth where not named).

    Returns:
        The decoder's memory ``[B, S, D]`` and each stream's states at the exits passed.
    """
    out: Tensor | None = None
    states: dict[str, StreamStates] = {}
    for stream in backbone.encoders:
        depth = depths.get(stream.name, stream.num_layers)
        state = stream.prologue(inputs, out)
        states[stream.name] = StreamStates({}, state.valid_BT)
        for k in range(1, depth + 1):
            state.h_BTD = stream.layer(k, state)
            if k in exits.layers.get(stream.name, ()):
                states[stream.name].at_exit[k] = state.h_BTD.detach()
        out = stream.epilogue(exits.adapt(stream.name, depth, state.h_BTD))
    assert out is not None
    return out, states


def decoder_states(backbone: Backbone, memory_BSD: Tensor, memory_mask: Tensor | None, ids_BT: Tensor) -> list[Tensor]:
    """Run the decoder over whole target sequences; return the states after layers 0 (embedding) to the last."""
    decoder = backbone.decoder
    states = [decoder.embed(ids_BT, 0)]
    mask = causal_mask(0, ids_BT.shape[1], states[0].dtype, ids_BT.device)
    for k in range(1, decoder.num_layers + 1):
        states.append(decoder.layer(k, states[-1], memory_BSD, mask, memory_mask))
    return states


def shift_right(labels_BT: Tensor, start_id: int, pad_id: int) -> Tensor:
    """Return the decoder's inputs for given labels."""
    ids_BT = labels_BT.roll(1, dims=1)
    ids_BT[:, 0] = start_id
    return ids_BT.masked_fill(ids_BT == IGNORE, pad_id)


def exit_result(backbone: Backbone, exits: Exits, k: int, h_BTD: Tensor, labels_BT: Tensor) -> ExitResult:
    """Return the loss and choices of the decoder exit after layer ``k``.

    The logits are recomputed in the backward pass, so that only one exit's logits are ever in memory.
    """

    def from_states(h_ND: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
        logits_NV = backbone.decoder.head(backbone.decoder.norm(exits.adapt("decoder", k, h_ND)))
        return cross_entropy(logits_NV.float(), labels_N), logits_NV.detach().argmax(-1)

    counts = labels_BT != IGNORE
    h_ND, labels_N = h_BTD[counts], labels_BT[counts]
    if torch.is_grad_enabled():
        loss, tokens = checkpoint(from_states, h_ND, labels_N, use_reentrant=False)
    else:
        loss, tokens = from_states(h_ND, labels_N)
    return ExitResult(loss, tokens)


def gate_loss(logits: Tensor, safe: Tensor) -> Tensor:
    """Return the class-balanced cross-entropy of a gate: safe and unsafe states weigh the same in each batch.

    Args:
        logits: gate logits, ``[n]``.
        safe: True where leaving changes nothing, ``[n]``.
    """
    share = safe.float().mean().clamp(0.02, 0.98)
    weight = torch.where(safe, 0.5 / share, 0.5 / (1 - share))
    return binary_cross_entropy_with_logits(logits.float(), safe.float(), weight=weight)
