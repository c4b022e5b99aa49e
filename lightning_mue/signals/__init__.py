"""Exit signals: pure tensor functions, each signed so that higher = safer to leave."""

from lightning_mue.signals.confidence import confidence, entropy, margin
from lightning_mue.signals.similarity import flat_similarity, pooled_similarity, similarity

OF_LOGITS = {"confidence": confidence, "margin": margin, "entropy": entropy}
"""Signals that are functions of an exit's logits."""

NEEDS_LOGITS = frozenset({*OF_LOGITS, "patience"})
"""Signals computed from an exit's logits: they cost a vocabulary head at every exit visited."""

__all__ = [
    "NEEDS_LOGITS",
    "OF_LOGITS",
    "confidence",
    "entropy",
    "flat_similarity",
    "margin",
    "pooled_similarity",
    "similarity",
]
