"""Scores of short answers against their references."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric


def score(metric: str, prediction: str, references: Sequence[str]) -> float:
    """Scores one answer.

    Args:
        metric: "exact_match" or "accuracy" (the same rule; the name that closed answers are reported under): 1 when
            any reference equals the prediction in lower case, white space collapsed, outer punctuation stripped.
        prediction: the answer.
        references: the accepted answers, at least one.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: an unknown metric, or no reference.
    """
    if metric not in _METRICS:
        raise ValueError(f"`metric` must be one of {sorted(_METRICS)}, got {metric!r}")
    if isinstance(references, str) or not references:
        raise ValueError(f"`references` must be a list of at least one text, got {references!r}")
    return _METRICS[metric](prediction, references)


def normalise(text: str) -> str:
    """Lower case, white space collapsed, punctuation stripped at both ends (a text of punctuation alone stays)."""
    plain = " ".join(text.lower().split())
    return plain.strip(string.punctuation + " ") or plain


def _exact_match(prediction: str, references: Sequence[str]) -> float:
    return float(normalise(prediction) in {normalise(reference) for reference in references})


_METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {"exact_match": _exact_match, "accuracy": _exact_match}


class AnswerScore(Metric):
    """Mean of ``score`` over all answers, on every rank.

    Args:
        metric: a name ``score`` knows.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, metric: str = "exact_match") -> None:
        super().__init__()
        score(metric, "", [""])  # an unknown name fails here, not after an epoch
        self.metric = metric
        # float64: the sum of many answers must not lose the last ones.
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        """Adds answers, each with its references.

        Raises:
            ValueError: the numbers of answers and reference lists differ.
        """
        if len(predictions) != len(references):
            raise ValueError(f"got {len(predictions)} predictions for {len(references)} lists of references")
        for prediction, accepted in zip(predictions, references, strict=True):
            self.total += score(self.metric, prediction, accepted)
        self.count += len(predictions)

    def compute(self) -> Tensor:
        """Return the mean, a float64 scalar; NaN before the first answer."""
        return self.total / self.count
