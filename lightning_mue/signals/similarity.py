"""Similarity of successive layers' states: MuE's saturation signal."""

from __future__ import annotations

import torch
from torch import Tensor


def similarity(h_BTD: Tensor, before_BTD: Tensor, valid_BT: Tensor | None = None) -> Tensor:
    """Return the mean cosine between a layer's states and those of the layer before, over each sample's own tokens.

    MuE (CVPR 2023, section 3.2) compares whole flattened batches; here every sample is judged alone,
    its padding masked.

    Args:
        h_BTD: states after layer k.
        before_BTD: states after layer k - 1 (after the prologue for k = 1).
        valid_BT: True at real tokens; None if all are.

    Returns:
        Scores ``[B]`` in [-1, 1], float32.
    """
    cosine_BT = torch.cosine_similarity(h_BTD.float(), before_BTD.float(), dim=-1)
    if valid_BT is None:
        return cosine_BT.mean(1)
    return (cosine_BT * valid_BT).sum(1) / valid_BT.sum(1).clamp(min=1)


def pooled_similarity(now_BE: Tensor, before_BE: Tensor) -> Tensor:
    """Return the cosine between two embeddings of each sample, ``[B]`` in [-1, 1], float32: what a layer left alone."""
    return torch.cosine_similarity(now_BE.float(), before_BE.float(), dim=-1)


def flat_similarity(h_BTD: Tensor, before_BTD: Tensor) -> Tensor:
    """Return one cosine over the whole flattened batch, padding included, for every row: ``[B]``, float32.

    What MuE's published code compares: a single decision for all samples, which depends on who else is in the batch.
    """
    one = torch.cosine_similarity(h_BTD.float().flatten(), before_BTD.float().flatten(), dim=0)
    return one.expand(h_BTD.shape[0])
