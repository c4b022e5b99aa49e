"""exit_losses: what a project adds to a loss that it makes of logits.

Shapes: ``B`` batch, ``T`` target positions, ``D`` width, ``V`` vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_mue.backbones import Backbone, view
from lightning_mue.exits import Exits, attached
from lightning_mue.prompt import IGNORE
from lightning_mue.training.gates import decoder_gates
from lightning_mue.training.objective import weighted
from lightning_mue.training.replace_loss import TrainingOutput
from lightning_mue.training.supervised import ExitResult, Supervised, exit_result
from lightning_mue.training.supervision import Supervision


def exit_losses(model: nn.Module, outputs: Any, labels: Tensor) -> Tensor:
    """Return the exits' losses, to be added to a project's own loss of full depth, which has weight 1.

    In a ``training_step`` under MultiExitSupervision they are those of its settings, for which the model runs a second
    time. In a loop of one's own they are of the decoder's exits and gates, and are made of the states in ``outputs``:
    the trunk is not run again.

    Args:
        model: what made ``outputs``.
        outputs: of a forward with gradients; in one's own loop with ``output_hidden_states=True``.
        labels: target tokens as transformers reads them, ``[B, T]``, -100 where none counts.

    Returns:
        A scalar; 0 without gradients, as in validation, and where no exits are attached.

    Raises:
        ValueError: in one's own loop: no states, or exits that only MultiExitSupervision trains.
    """
    if isinstance(outputs, TrainingOutput):
        return outputs.exit_losses(labels)
    exits = attached(model)
    if exits is None or not torch.is_grad_enabled():
        return torch.zeros((), device=labels.device)
    if beyond := sorted(exits.layers.keys() - {"decoder"}):
        raise ValueError(
            f"Exits of {beyond} learn from streams that are left early in training, which MultiExitSupervision does; "
            "`exit_losses` alone trains those of 'decoder'."
        )
    states = getattr(outputs, "decoder_hidden_states", None)
    if states is None:
        raise ValueError(
            f"The outputs of {type(model).__name__} hold no `decoder_hidden_states`: call it with "
            "`output_hidden_states=True`, or, if it gives none (BLIP, CoCa), train by MultiExitSupervision."
        )
    if labels.shape != outputs.logits.shape[:2]:
        raise ValueError(
            f"`labels` must be [B, T] as the logits, {[*outputs.logits.shape[:2]]}, got {[*labels.shape]}."
        )
    return _of_states(view(model), exits, list(states), outputs.logits, labels)


def _of_states(backbone: Backbone, exits: Exits, states: list[Tensor], logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Return the decoder exits' weighted losses and their gates' loss; ``states`` after layers 0 to the last."""
    how, counts_BT = Supervision(), labels_BT != IGNORE
    results = {k: exit_result(backbone, exits, k, states[k], labels_BT) for k in exits.layers["decoder"]}
    zero = logits_BTV.new_zeros(())
    results[backbone.decoder.num_layers] = ExitResult(zero, logits_BTV.detach().argmax(-1)[counts_BT], None)
    losses = {k: result.loss for k, result in results.items()}
    idle = torch.stack([p.sum() for p in exits.parameters()]).sum() * 0.0  # in a distributed step all take part
    total = idle + weighted(losses, how, beside=True, left_out=True)
    if exits.config.gate:
        found = Supervised(results, states, {}, counts_BT, {})
        total = total + how.gate_weight * decoder_gates(backbone, exits, found, how.gate_balance)
    return total
