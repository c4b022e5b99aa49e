"""Exit signals: pure tensor functions, each signed so that higher = safer to leave."""

from lightning_mue.signals.confidence import confidence, margin
from lightning_mue.signals.similarity import similarity

NEEDS_LOGITS = frozenset({"confidence", "margin"})
"""Signals computed from an exit's logits: they cost a vocabulary head at every exit visited."""

__all__ = ["NEEDS_LOGITS", "confidence", "margin", "similarity"]
