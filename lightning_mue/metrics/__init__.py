"""Metrics: scores of answers in [0, 1], and their means as torchmetrics."""

from lightning_mue.metrics.answers import AnswerScore, score

__all__ = ["AnswerScore", "score"]
