"""Confidence of an exit's own prediction: the step-level signals of DEED and CALM."""

from __future__ import annotations

from torch import Tensor


def confidence(logits: Tensor) -> Tensor:
    """Return the top probability, ``[...]`` in [0, 1], from logits ``[..., V]``."""
    return logits.float().softmax(-1).amax(-1)


def margin(logits: Tensor) -> Tensor:
    """Return top probability minus second (CALM, section 3.3), ``[...]`` in [0, 1], from logits ``[..., V]``."""
    top = logits.float().softmax(-1).topk(2, dim=-1).values
    return top[..., 0] - top[..., 1]
