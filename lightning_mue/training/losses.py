"""Losses of exits as pure arithmetic: how much each counts, distillation, gates."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, kl_div

Weighting = Literal["avg+last", "sum", "linear"]


def exit_weights(kind: Weighting, layers: tuple[int, ...]) -> tuple[float, ...]:
    """Return the loss weight of each exit; ``layers`` are the exits in order, the last layer included.

    ``avg+last``: the mean over exits plus the last layer once more, so that something optimises it alone (DEED).
    ``sum``: plain sum (MuE, section 3.3). ``linear``: ``k / sum of k`` (CALM, section 3.2).

    Raises:
        ValueError: unknown kind.
    """
    count = len(layers)
    if kind == "avg+last":
        return (*[1 / count] * (count - 1), 1 / count + 1)
    if kind == "sum":
        return (1.0,) * count
    if kind == "linear":
        return tuple(k / sum(layers) for k in layers)
    raise ValueError(f"`weighting` must be avg+last, sum or linear, got {kind!r}")


def divergence(logits_NV: Tensor, teacher_NV: Tensor, temperature: float) -> Tensor:
    """Return the mean KL divergence from a teacher to an exit at a temperature, times the temperature squared.

    The square keeps the size of the gradient whatever the temperature (Hinton et al., 2015, section 2).

    Args:
        logits_NV: of the exit.
        teacher_NV: the teacher's log-probabilities at that temperature.
        temperature: divides the exit's logits.
    """
    log_p_NV = (logits_NV.float() / temperature).log_softmax(-1)
    return kl_div(log_p_NV, teacher_NV, log_target=True, reduction="batchmean") * temperature**2


def gate_loss(logits: Tensor, safe: Tensor, balance: bool = True) -> Tensor:
    """Return the cross-entropy of a gate.

    Args:
        logits: gate logits, ``[n]``.
        safe: True where leaving changes nothing, ``[n]``.
        balance: let safe and unsafe states weigh the same in each batch, however rare one of them is.
    """
    weight = None
    if balance:
        share = safe.float().mean().clamp(0.02, 0.98)
        weight = torch.where(safe, 0.5 / share, 0.5 / (1 - share))
    return binary_cross_entropy_with_logits(logits.float(), safe.float(), weight=weight)
