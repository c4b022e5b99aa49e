"""What gates learn: targets from passes of the model itself; the states they read carry no gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mue.backbones import Backbone
from lightning_mue.backbones.contrastive import Contrastive
from lightning_mue.backbones.stream import Inputs
from lightning_mue.exits import Exits
from lightning_mue.inference import ExitEngine
from lightning_mue.inference.gallery import places
from lightning_mue.policy import ExitPolicy
from lightning_mue.training.contrast import Paired, equal_rows
from lightning_mue.training.losses import gate_loss
from lightning_mue.training.supervised import IGNORE, Supervised, supervise


def decoder_gate_logits(backbone: Backbone, exits: Exits, found: Supervised) -> dict[int, Tensor]:
    """Return decoder exit -> its gate's logits ``[N]``."""
    rows = exits.shortlist_head(backbone.decoder)
    return {
        k: exits.gate_logit("decoder", k, found.states[k].detach()[found.counts_BT], rows=rows)
        for k in exits.layers.get("decoder", ())
    }


def decoder_gates(backbone: Backbone, exits: Exits, found: Supervised, balance: bool) -> Tensor:
    """Mean gate loss over the decoder's exits; the target is "the last layer chooses the same token"."""
    logits = decoder_gate_logits(backbone, exits, found)
    losses = [gate_loss(logits_N, found.agrees(k), balance) for k, logits_N in logits.items()]
    return torch.stack(losses).mean() if losses else torch.zeros((), device=found.counts_BT.device)


def own_path(backbone: Backbone, exits: Exits, inputs: Inputs) -> Supervised:
    """Teacher-force the model's own greedy output, everything at full depth and without dropout or gradient."""
    with torch.no_grad(), evaluating(backbone.model):
        return supervise(backbone, exits, inputs, own_labels(backbone, inputs), {})


def own_labels(backbone: Backbone, inputs: Inputs) -> Tensor:
    """Decode greedily at full depth, as inference does it; return labels ``[B, T]`` ended as references are."""
    engine = ExitEngine(backbone.model, ExitPolicy.full_depth(), check_fingerprint=False)
    wanted: dict[str, Any] = {name: inputs.get(name) for name in backbone.generate_inputs}
    with torch.autocast(next(backbone.model.parameters()).device.type, enabled=False):
        ids_BT = engine.generate(**wanted).sequences[:, 1:]
    ends = torch.tensor(backbone.decode_settings(None).end_ids, device=ids_BT.device)
    is_end_BT = torch.isin(ids_BT, ends).long()
    return ids_BT.masked_fill(is_end_BT.cumsum(1) > is_end_BT, IGNORE)


def stream_gates(
    backbone: Backbone, exits: Exits, inputs: Inputs, labels_BT: Tensor, depths: Mapping[str, int], balance: bool
) -> Tensor:
    """Gate loss of the one stream that was left early in this step.

    The target is "the last decoder layer chooses the same tokens as with all streams at full depth". Two gradient-free
    passes say so, both without dropout, whose noise would make every exit look harmful. Steps in which several streams
    are left early teach no gate: the blame is not clear.
    """
    if len(depths) != 1:
        return torch.zeros((), device=labels_BT.device)
    stream, depth = next(iter(depths.items()))
    last = (backbone.decoder.num_layers,)
    with torch.no_grad(), evaluating(backbone.model):
        early = supervise(backbone, exits, inputs, labels_BT, depths, last)
        full = supervise(backbone, exits, inputs, labels_BT, {}, last)
    differs_BT = torch.zeros_like(early.counts_BT)
    differs_BT[early.counts_BT] = early.last.tokens_N != full.last.tokens_N
    states = early.streams[stream]
    logits_B = exits.gate_logit(stream, depth, states.at_exit[depth], states.valid_BT)
    return gate_loss(logits_B, ~differs_BT.any(1), balance)


def text_gates(contrastive: Contrastive, exits: Exits, paired: Paired, balance: bool) -> Tensor:
    """Mean gate loss over the exits of the texts that only compare.

    The target is "a text that finds its picture first at full depth finds it first leaving here too", among those of
    this process's batch. The pictures must have gone full depth, as a gallery's do.
    """
    name, last = contrastive.text.name, contrastive.text.num_layers
    with torch.no_grad(), torch.autocast(paired.image_BE.device.type, enabled=False):
        image_BE, same_BB = paired.image_BE, equal_rows(paired.text_BT)
        row_B = torch.arange(len(image_BE), device=image_BE.device)
        finds_B = {k: places(text_BE, image_BE, row_B, image_BE, same_BB) < 1 for k, text_BE in paired.text_BE.items()}
    losses = [
        gate_loss(exits.gate_logit(name, k, state.h_BTD.detach(), state.valid_BT), finds_B[k] | ~finds_B[last], balance)
        for k, state in paired.states.items()
        if k != last
    ]
    return torch.stack(losses).mean() if losses else torch.zeros((), device=paired.image_BE.device)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode for a moment; modules that a user froze in eval mode stay so."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
