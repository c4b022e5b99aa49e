"""The objective of one training step: deep supervision or propagated states, streams left early, distillation, gates.

Pure; Lightning only calls it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_mue.backbones import Backbone
from lightning_mue.backbones.stream import Inputs
from lightning_mue.exits import Exits
from lightning_mue.training.contrast import contrast, pair
from lightning_mue.training.depths import Step, sample_token_depths
from lightning_mue.training.gates import decoder_gates, own_path, stream_gates, text_gates
from lightning_mue.training.losses import exit_weights
from lightning_mue.training.supervised import (
    IGNORE,
    Supervised,
    decoder_exits,
    exit_result,
    run_streams,
    supervise,
    teacher_forced,
)
from lightning_mue.training.supervision import Supervision


@dataclass
class Objective:
    """A step's losses.

    Args:
        total: what is minimised.
        gates: of the gates, without their weight.
        distill: mean divergence of the exits from the last one, without its weight.
        by_exit: decoder layer -> its cross-entropy; empty in a step with propagated states.
        contrast: layer of the text stream -> contrastive loss; empty where nothing is compared.
    """

    total: Tensor
    gates: Tensor
    distill: Tensor
    by_exit: dict[int, Tensor]
    contrast: dict[int, Tensor]


def objective(
    backbone: Backbone,
    exits: Exits,
    inputs: Inputs,
    labels_BT: Tensor,
    step: Step,
    how: Supervision,
    beside: bool = False,
) -> Objective:
    """Return the losses of a step.

    Every adapter and gate takes part in every step (with weight zero where it has nothing to learn), and in distributed
    training every parameter, so that it never waits for a missing gradient.

    Args:
        backbone: the model's streams.
        exits: its exits.
        inputs: the backbone's own.
        labels_BT: target tokens, -100 where none counts.
        step: what was drawn.
        how: the settings.
        beside: the total is added to the full-depth losses of somebody else, and does not hold them: the exits' weights
            are those of ``weighting`` in relation to the last layer's. (Where streams are left early the last layer
            reads other states, and its loss is held.)
    """
    gates = distill = zero = torch.zeros((), device=labels_BT.device)
    found, by_exit, compared = None, dict[int, Tensor](), dict[int, Tensor]()
    if step.token_seed is not None:
        deep = how.caption * propagated_loss(backbone, exits, inputs, labels_BT, step, how)
    else:
        temperature = how.distill_temperature if how.distill else None
        found = supervise(backbone, exits, inputs, labels_BT, step.depths, None, temperature)
        by_exit = {k: result.loss for k, result in found.results.items()}
        left_out = beside and not step.depths
        deep = how.caption * weighted(by_exit, how, beside, left_out) + zero
        apart = [result.divergence for result in found.results.values() if result.divergence is not None]
        distill = torch.stack(apart).mean() if apart else distill
        if how.contrast and backbone.contrastive is not None:
            left, start_id = found.left[backbone.contrastive.image.name], backbone.decode_settings(None).start_id
            paired = pair(backbone.contrastive, exits, left, labels_BT, start_id)
            compared = contrast(backbone.contrastive, paired)
            deep = deep + how.contrast * weighted(compared, how, beside, left_out)
            if exits.config.gate and how.gate_weight and not step.depths:
                gates = text_gates(backbone.contrastive, exits, paired, how.gate_balance)
    if exits.config.gate and how.gate_weight:
        gates = gates + _decoder_gates(backbone, exits, inputs, found, step, how)
        gates = gates + stream_gates(backbone, exits, inputs, labels_BT, step.depths, how.gate_balance)
    # A stream left early leaves layers of the backbone idle too; DDP would wait for their gradients.
    module = backbone.model if torch.distributed.is_initialized() else exits
    idle = sum(p.sum() for p in module.parameters() if p.requires_grad) * 0.0
    total = deep + how.distill * distill + how.gate_weight * gates + idle
    return Objective(total, gates.detach(), distill.detach(), by_exit, compared)


def weighted(losses: dict[int, Tensor], how: Supervision, beside: bool, left_out: bool) -> Tensor | float:
    """Return the weighted sum over layers; ``beside``: in units of the last one's weight, which may be left out."""
    weights = exit_weights(how.weighting, tuple(losses))
    unit, last = (weights[-1] if beside else 1.0), max(losses)
    each = zip(weights, losses.items(), strict=True)
    return sum(weight / unit * loss for weight, (k, loss) in each if not (left_out and k == last))


def propagated_loss(
    backbone: Backbone, exits: Exits, inputs: Inputs, labels_BT: Tensor, step: Step, how: Supervision
) -> Tensor:
    """Return the loss of a step in which every target position is left at a random exit and its state passed up.

    Each position counts at its own exit alone, weighted so that in expectation every exit, the last layer included, has
    the weight that deep supervision gives it.
    """
    assert step.token_seed is not None
    layers = decoder_exits(backbone, exits)
    ids_BT, labels_BT = teacher_forced(backbone, inputs, labels_BT)
    counts_BT = labels_BT != IGNORE
    depth_BT = sample_token_depths(layers, labels_BT.shape, step.token_seed).to(labels_BT.device)
    depth_BT = depth_BT.masked_fill(~counts_BT, layers[-1])  # a decoder prompt is always computed
    states, _ = run_streams(backbone, exits, inputs, ids_BT, step.depths, depth_BT)
    losses = []
    for k, weight in zip(layers, exit_weights(how.weighting, layers), strict=True):
        here_BT = counts_BT & (depth_BT == k)
        if here_BT.any():
            result = exit_result(backbone, exits, k, states[k], labels_BT.masked_fill(~here_BT, IGNORE))
            losses.append(len(layers) * weight * here_BT.sum() / counts_BT.sum() * result.loss)
    return torch.stack(losses).sum()


def _decoder_gates(
    backbone: Backbone, exits: Exits, inputs: Inputs, found: Supervised | None, step: Step, how: Supervision
) -> Tensor:
    """Loss of the decoder's gates: along the model's own output, or along references that went full depth."""
    if step.own_path and "decoder" in exits.layers:
        found = own_path(backbone, exits, inputs)
    if found is None:
        return torch.zeros((), device=next(exits.parameters()).device)
    return decoder_gates(backbone, exits, found, how.gate_balance)
