"""Scores of answers against their references."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_mue.metrics.checks import check_batch, check_references
from lightning_mue.metrics.cider import DocumentFrequencies, cider_d
from lightning_mue.metrics.edits import anls, character_accuracy
from lightning_mue.metrics.rouge import rouge_l
from lightning_mue.metrics.tokens import tokenise_caption
from lightning_mue.metrics.vqa import vqa_accuracy

Score = Callable[[str, Sequence[str]], float]
"""Scores one answer: prediction, references -> number."""


def score(metric: str, prediction: str, references: Sequence[str]) -> float:
    """Scores one answer.

    Args:
        metric: one that needs nothing but the sample:

            * ``exact_match`` or ``accuracy`` (the same rule; the name that closed answers are reported under): 1 when
              any reference equals the prediction in lower case, white space collapsed, outer punctuation stripped;
            * ``exact_text``: 1 when a reference equals the prediction letter by letter, white space collapsed;
            * ``vqa_accuracy``: how many of the people asked gave the answer;
            * ``anls``, ``character_accuracy``: by edit distance, for text that is read;
            * ``rouge_l``: of a caption.
        prediction: the answer.
        references: the accepted answers, at least one.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: an unknown metric, one that needs a corpus, or no reference.
    """
    return scorer(metric)(prediction, references)


def scorer(metric: str, frequencies: DocumentFrequencies | None = None) -> Score:
    """Returns what scores answers: ``score`` of one metric, and ``cider`` (CIDEr-D, in [0, 10]) of captions.

    Args:
        metric: a name ``score`` knows, or "cider".
        frequencies: document frequencies of a fixed corpus of references, which only "cider" reads; they keep a
            sample's score from depending on others.

    Raises:
        ValueError: an unknown metric, or "cider" without ``frequencies``.
    """
    if metric == "cider":
        if frequencies is None:
            raise ValueError(
                "Metric 'cider' needs `frequencies` of a fixed corpus of references; count them once with "
                "DocumentFrequencies.from_references and give them to `scorer`"
            )
        return partial(_caption_score, partial(cider_d, frequencies=frequencies))
    if metric not in _METRICS:
        raise ValueError(f"`metric` must be one of {sorted([*_METRICS, 'cider'])}, got {metric!r}")
    return _METRICS[metric]


def normalise(text: str) -> str:
    """Lower case, white space collapsed, punctuation stripped at both ends (a text of punctuation alone stays)."""
    plain = " ".join(text.lower().split())
    return plain.strip(string.punctuation + " ") or plain


def _exact_match(prediction: str, references: Sequence[str]) -> float:
    check_references(references)
    return float(normalise(prediction) in {normalise(reference) for reference in references})


def _exact_text(prediction: str, references: Sequence[str]) -> float:
    check_references(references)
    return float(prediction.split() in [reference.split() for reference in references])


def _caption_score(rule: Score, prediction: str, references: Sequence[str]) -> float:
    check_references(references)
    return rule(tokenise_caption(prediction), [tokenise_caption(reference) for reference in references])


_METRICS: dict[str, Score] = {
    "exact_match": _exact_match,
    "accuracy": _exact_match,
    "exact_text": _exact_text,
    "vqa_accuracy": vqa_accuracy,
    "anls": anls,
    "character_accuracy": character_accuracy,
    "rouge_l": partial(_caption_score, rouge_l),
}


class AnswerScore(Metric):
    """Mean of a score over all answers, on every rank.

    Args:
        metric: a name ``scorer`` knows.
        frequencies: document frequencies, for "cider".
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    def __init__(self, metric: str = "exact_match", frequencies: DocumentFrequencies | None = None) -> None:
        super().__init__()
        self.metric = metric
        self._score = scorer(metric, frequencies)  # an unknown name fails here, not after an epoch
        # [sum, number]; float64: the sum of many answers must not lose the last ones. The name is the metric's own: a
        # MetricCollection takes metrics whose states have the same names and once the same values for one.
        self._state = f"sum_of_{metric}"
        self.add_state(self._state, torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        """Adds answers, each with its references.

        Raises:
            ValueError: the numbers of answers and reference lists differ, or an answer has no references.
        """
        check_batch(predictions, references)
        total = sum(self._score(p, refs) for p, refs in zip(predictions, references, strict=True))
        state = getattr(self, self._state)
        state.add_(torch.tensor([total, len(predictions)], dtype=torch.float64, device=state.device))

    def compute(self) -> Tensor:
        """Return the mean, a float64 scalar; NaN before the first answer."""
        total, count = getattr(self, self._state)
        return total / count
