"""Scores of a corpus that are no means over its samples: from counts that add up. numpy only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

ORDERS = (1, 2, 3, 4)
_TINY, _SMALL = 1e-15, 1e-9
"""COCO's constants: added to what may be 0 above and below a fraction line."""


def bleu_scores(counts: Any) -> list[Any]:
    """Return BLEU-1 to BLEU-4 (Papineni et al. 2002, section 2.3) as COCO's caption evaluation computes them.

    Args:
        counts: ten numbers, or an array ``[10, R]`` of R corpora: by order the n-grams that a reference holds, and the
            n-grams in all; the words of the captions; those of the references closest in length.

    Returns:
        By order, a number, or ``[R]``.
    """
    matched, found, (length, closest) = counts[:4], counts[4:8], counts[8:]
    ratio = (length + _TINY) / (closest + _SMALL)
    brevity = np.exp(np.minimum(0.0, 1 - 1 / ratio))
    scores, product = [], 1.0
    for n, hits, grams in zip(ORDERS, matched, found, strict=True):
        product *= (hits + _TINY) / (grams + _SMALL)
        scores.append(product ** (1 / n) * brevity)
    return scores


def sentence_bleu(counts: Any) -> float:
    """Return BLEU-4 of one caption, in [0, 1]: 1 is added to hits and n-grams of orders above 1 (Lin and Och 2004).

    Without that, most captions score nothing. Its mean over a corpus is not the corpus' BLEU.
    """
    above_1 = np.array([0, 1, 1, 1] * 2 + [0, 0])
    return float(min(bleu_scores(np.asarray(counts) + above_1)[-1], 1.0))


CORPUS: dict[str, Callable[[Any], Any]] = {"bleu": lambda counts: bleu_scores(counts)[-1]}
"""Metric of a corpus -> what computes it from the sums of its samples' counts, ``[K]``, or ``[K, R]`` at once."""
