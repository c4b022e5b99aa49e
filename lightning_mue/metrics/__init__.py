"""Metrics: scores of answers and captions, of single samples and as torchmetrics, and metrics of exits."""

from lightning_mue.metrics.answers import AnswerScore, score, scorer
from lightning_mue.metrics.bleu import Bleu
from lightning_mue.metrics.cider import Cider, DocumentFrequencies
from lightning_mue.metrics.exits import ExitAgreement, MeanExitDepth
from lightning_mue.metrics.tokens import tokenise_caption

__all__ = [
    "AnswerScore",
    "Bleu",
    "Cider",
    "DocumentFrequencies",
    "ExitAgreement",
    "MeanExitDepth",
    "score",
    "scorer",
    "tokenise_caption",
]
