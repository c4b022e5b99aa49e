"""BLEU as COCO's caption evaluation computes it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_mue.corpus import ORDERS, bleu_scores
from lightning_mue.metrics.checks import check_batch, check_references
from lightning_mue.metrics.tokens import ngrams, tokenise_caption


def bleu_counts(prediction: str, references: Sequence[str]) -> list[int]:
    """Count what BLEU needs of one caption; the counts of a corpus are the sums over its captions.

    Args:
        prediction: the caption, tokens joined by spaces.
        references: likewise, at least one.

    Returns:
        Ten numbers: by order the n-grams that a reference holds (each as often as the reference with most of it) and
        the n-grams in all; the words of the caption; those of the reference closest in length, the shorter of two.
    """
    check_references(references)
    words, others = prediction.split(), [reference.split() for reference in references]
    matched, found = [], []
    for n in ORDERS:
        ours, most = ngrams(words, n), Counter[str]()
        for other in others:
            most |= ngrams(other, n)
        matched.append((ours & most).total())
        found.append(ours.total())
    closest = min((len(other) for other in others), key=lambda length: (abs(length - len(words)), length))
    return [*matched, *found, len(words), closest]


def caption_counts(
    prediction: str, references: Sequence[str], tokenise: Callable[[str], str] = tokenise_caption
) -> list[int]:
    """Return ``bleu_counts`` of texts that are not tokenised."""
    return bleu_counts(tokenise(prediction), [tokenise(reference) for reference in references])


class Bleu(Metric):
    """Corpus BLEU over all captions on every rank, in COCO's convention.

    ``torchmetrics.text.BLEUScore`` is another number where two references are equally close in length (it takes the
    first, COCO the shorter) and where no n-gram of some order matches (0, where COCO gives little more than 0), and
    computes in float32.

    Args:
        n: the highest order, 1 to 4. Metrics of several orders in one ``MetricCollection`` count only once.
        tokenise: text -> tokens joined by spaces; ``str`` leaves tokenised text alone.

    Raises:
        ValueError: ``n`` is none of the orders.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    counts: Tensor

    def __init__(self, n: int = 4, tokenise: Callable[[str], str] = tokenise_caption) -> None:
        super().__init__()
        if n not in ORDERS:
            raise ValueError(f"`n` must be one of {list(ORDERS)}, got {n!r}")
        self.n, self.tokenise = n, tokenise
        self.add_state("counts", torch.zeros(2 * len(ORDERS) + 2, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        """Add captions, each with its references.

        Raises:
            ValueError: the numbers of captions and reference lists differ, or a caption has no references.
        """
        check_batch(predictions, references)
        for prediction, accepted in zip(predictions, references, strict=True):
            counts = caption_counts(prediction, accepted, self.tokenise)
            self.counts += torch.tensor(counts, device=self.device)

    def compute(self) -> Tensor:
        """Return BLEU-n, a float64 scalar; NaN before the first caption."""
        score = bleu_scores(self.counts.tolist())[self.n - 1] if self.counts.any() else math.nan
        return torch.tensor(score, dtype=torch.float64, device=self.device)
