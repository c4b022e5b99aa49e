"""Confidence of an exit's own prediction: the step-level signals of DEED and CALM."""

from __future__ import annotations

import math

from torch import Tensor


def confidence(logits: Tensor) -> Tensor:
    """Return the top probability, ``[...]`` in [0, 1], from logits ``[..., V]``."""
    return logits.float().softmax(-1).amax(-1)


def margin(logits: Tensor) -> Tensor:
    """Return top probability minus second (CALM, section 3.3), ``[...]`` in [0, 1], from logits ``[..., V]``."""
    top = logits.float().softmax(-1).topk(2, dim=-1).values
    return top[..., 0] - top[..., 1]


def entropy(logits: Tensor) -> Tensor:
    """Return 1 - entropy / log V, ``[...]`` in [0, 1], from logits ``[..., V]``: 1 when the exit is sure."""
    log_p = logits.float().log_softmax(-1)
    # A token that the constraint forbids has probability 0 and adds nothing, not 0 * inf.
    nats = -(log_p.exp() * log_p.nan_to_num(neginf=0.0)).sum(-1)
    return (1 - nats / math.log(logits.shape[-1])).clamp(0.0, 1.0)
