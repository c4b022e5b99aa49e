"""Exit signals over arrays: the numbers of `lightning_mue.signals`, where there is no torch.

Shapes: ``B`` samples, ``T`` positions, ``D`` width, ``V`` vocabulary.
"""

from __future__ import annotations

import math

import numpy as np

Array = np.ndarray
_LEAST_NORM = np.float32(1e-8)
_LEAST_ODDS = 1e-6


def similarity(h_BTD: Array, before_BTD: Array, valid_BT: Array | None = None) -> Array:
    """Return the mean cosine between two layers' states over each sample's valid tokens, ``[B]``."""
    cosine_BT = _cosine(h_BTD, before_BTD)
    if valid_BT is None:
        return cosine_BT.mean(1)
    mean_B: Array = (cosine_BT * valid_BT).sum(1) / valid_BT.sum(1).clip(min=1)
    return mean_B


def flat_similarity(h: Array, before: Array) -> Array:
    """Return one cosine over the whole flattened batch for every row, ``[B]``."""
    return np.full(len(h), _cosine(h.ravel(), before.ravel()), np.float32)


def confidence(logits_BV: Array) -> Array:
    """Return the top probability, ``[B]``."""
    return _softmax(logits_BV).max(-1)


def margin(logits_BV: Array) -> Array:
    """Return top probability minus second, ``[B]``."""
    top_B2 = _top_two(logits_BV)
    return top_B2[:, 0] - top_B2[:, 1]


def entropy(logits_BV: Array) -> Array:
    """Return 1 - entropy / log V, ``[B]``: 1 when the exit is sure."""
    p_BV = _softmax(logits_BV)
    nats_B = -(p_BV * np.log(p_BV, where=p_BV > 0, out=np.zeros_like(p_BV))).sum(-1)
    return (1 - nats_B / np.float32(math.log(logits_BV.shape[-1]))).clip(0, 1)


OF_LOGITS = {"confidence": confidence, "margin": margin, "entropy": entropy}
"""Signals that are functions of an exit's logits."""

NEEDS_LOGITS = frozenset({*OF_LOGITS, "patience"})
"""Signals computed from an exit's logits."""


def pool(h_BTD: Array, valid_BT: Array | None) -> Array:
    """Return the mean state over each sample's valid tokens, ``[B, D]``."""
    if valid_BT is None:
        return h_BTD.mean(1)
    weight_BT1 = valid_BT[..., None].astype(np.float32)
    mean_BD: Array = (h_BTD * weight_BT1).sum(1) / weight_BT1.sum(1).clip(min=1)
    return mean_BD


def sigmoid(logits: Array) -> Array:
    """Return the probabilities of logits."""
    with np.errstate(over="ignore"):  # e to the power of much is infinite, and one over it nothing: as it should be
        probabilities: Array = 1 / (1 + np.exp(-logits))
    return probabilities


def log_odds_of_two(logits_BV: Array) -> Array:
    """Return the log-odds of the two highest probabilities, ``[B, 2]``; ends at +-13.8 (1e-6)."""
    p_B2 = _top_two(logits_BV).clip(np.float32(_LEAST_ODDS), np.float32(1 - _LEAST_ODDS))
    odds_B2: Array = np.log(p_B2 / (1 - p_B2))
    return odds_B2


def log_softmax(logits_BV: Array) -> Array:
    """Return log probabilities, ``[B, V]``."""
    shifted_BV = logits_BV - logits_BV.max(-1, keepdims=True)
    shifted_BV -= np.log(np.exp(shifted_BV).sum(-1, keepdims=True))
    return shifted_BV


def _cosine(a: Array, b: Array) -> Array:
    norms = (np.sqrt((x * x).sum(-1)).clip(min=_LEAST_NORM) for x in (a, b))
    cosine: Array = (a * b).sum(-1) / math.prod(norms)
    return cosine


def _softmax(logits_BV: Array) -> Array:
    p_BV = np.exp(logits_BV - logits_BV.max(-1, keepdims=True))
    p_BV /= p_BV.sum(-1, keepdims=True)
    return p_BV


def _top_two(logits_BV: Array) -> Array:
    return -np.partition(-_softmax(logits_BV), 1, axis=-1)[:, :2]
