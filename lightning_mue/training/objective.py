"""The objective of one training step: deep supervision, streams left early, gates. Pure; Lightning only calls it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_mue.backbones import Backbone
from lightning_mue.backbones.stream import Inputs
from lightning_mue.exits import Exits
from lightning_mue.training.losses import Weighting, exit_weights
from lightning_mue.training.supervised import (
    IGNORE,
    ExitResult,
    StreamStates,
    decoder_states,
    encode,
    exit_result,
    gate_loss,
    shift_right,
)


@dataclass
class Objective:
    """A step's losses: ``total`` is what is minimised; ``by_exit`` maps decoder layers to their cross-entropy."""

    total: Tensor
    gates: Tensor
    by_exit: dict[int, Tensor]


def decoder_exits(backbone: Backbone, exits: Exits) -> tuple[int, ...]:
    """Return the decoder's exit layers, the last layer included."""
    return (*exits.layers.get("decoder", ()), backbone.decoder.num_layers)


def supervise(
    backbone: Backbone, exits: Exits, inputs: Inputs, labels_BT: Tensor, depths: Mapping[str, int]
) -> tuple[dict[int, ExitResult], list[Tensor], dict[str, StreamStates]]:
    """Teacher-force every decoder exit, the streams before it left at ``depths``.

    Returns:
        Decoder layer -> result, the decoder's states after every layer, each stream's states at the exits it passed.
    """
    settings = backbone.decode_settings(None)
    memory_BSD, streams = encode(backbone, exits, inputs, depths)
    ids_BT = shift_right(labels_BT, settings.start_id, settings.pad_id)
    states = decoder_states(backbone, memory_BSD, backbone.memory_mask(inputs), ids_BT)
    results = {k: exit_result(backbone, exits, k, states[k], labels_BT) for k in decoder_exits(backbone, exits)}
    return results, states, streams


def objective(
    backbone: Backbone,
    exits: Exits,
    inputs: Inputs,
    labels_BT: Tensor,
    depths: Mapping[str, int],
    weighting: Weighting,
    gate_weight: float,
) -> Objective:
    """Return the losses of a step.

    Every adapter and gate takes part in every step (with weight zero where it has nothing to learn), and in distributed
    training every parameter, so that it never waits for a missing gradient.
    """
    results, states, _ = supervise(backbone, exits, inputs, labels_BT, depths)
    layers = tuple(results)
    by_exit = {k: r.loss for k, r in results.items()}
    deep = sum(w * by_exit[k] for w, k in zip(exit_weights(weighting, layers), layers, strict=True))
    gates = torch.zeros((), device=labels_BT.device)
    if exits.config.gate and gate_weight:
        gates = gates + _decoder_gates(exits, results, states, labels_BT)
        gates = gates + _stream_gates(backbone, exits, inputs, labels_BT, depths)
    # A stream left early leaves layers of the backbone idle too; DDP would wait for their gradients.
    module = backbone.model if torch.distributed.is_initialized() else exits
    idle = sum(p.sum() for p in module.parameters() if p.requires_grad) * 0.0
    return Objective(deep + gate_weight * gates + idle, gates.detach(), by_exit)


def _decoder_gates(exits: Exits, results: Mapping[int, ExitResult], states: list[Tensor], labels_BT: Tensor) -> Tensor:
    """Mean gate loss over the decoder's exits; the target is "the last layer chooses the same token"."""
    last = results[max(results)].tokens_N
    losses = [
        gate_loss(exits.gate_logit("decoder", k, states[k].detach()[labels_BT != IGNORE]), results[k].tokens_N == last)
        for k in exits.layers.get("decoder", ())
    ]
    return torch.stack(losses).mean() if losses else torch.zeros((), device=labels_BT.device)


def _stream_gates(
    backbone: Backbone, exits: Exits, inputs: Inputs, labels_BT: Tensor, depths: Mapping[str, int]
) -> Tensor:
    """Gate loss of the one stream that was left early in this step.

    The target is "the last decoder layer chooses the same tokens as with all streams at full depth". Two gradient-free
    passes say so, both without dropout, whose noise would make every exit look harmful. Steps in which several streams
    are left early teach no gate: the blame is not clear.
    """
    if len(depths) != 1:
        return torch.zeros((), device=labels_BT.device)
    stream, depth = next(iter(depths.items()))
    last = backbone.decoder.num_layers
    with torch.no_grad(), _evaluating(backbone.model):
        early, _, states = supervise(backbone, exits, inputs, labels_BT, depths)
        full, _, _ = supervise(backbone, exits, inputs, labels_BT, {})
    counts = labels_BT != IGNORE
    differs_BT = torch.zeros_like(counts)
    differs_BT[counts] = early[last].tokens_N != full[last].tokens_N
    found = states[stream]
    return gate_loss(exits.gate_logit(stream, depth, found.at_exit[depth], found.valid_BT), ~differs_BT.any(1))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode for a moment; modules that a user froze in eval mode stay so."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
