"""Scores by edit distance, for text that is read off a picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightning_mue.metrics.checks import check_references

THRESHOLD = 0.5
"""ANLS below it is 0: the answer is another one, not a misread one."""


def edit_distance(a: str, b: str) -> int:
    """Return the Levenshtein distance: the fewest characters to insert, delete or replace.

    ``torchmetrics.functional.text.edit_distance`` searches within a beam and returns too much for texts that are
    shifted by more than it.
    """
    codes = np.fromiter(map(ord, b), np.int64, len(b))
    steps = np.arange(len(b) + 1)
    row = steps
    for i, char in enumerate(a, 1):
        best = np.minimum(row[1:] + 1, row[:-1] + (codes != ord(char)))  # delete; keep or replace
        # Insert: from any place to the left, one for each step.
        row = np.minimum.accumulate(np.concatenate(([i], best)) - steps) + steps
    return int(row[-1])


def character_accuracy(prediction: str, references: Sequence[str]) -> float:
    """Return ``1 - edit distance / len(reference)``, at least 0, of the best reference; case and space count.

    Of one sample; the character error rate of a corpus is ``torchmetrics.text.CharErrorRate``.

    Returns:
        A number in [0, 1]; for an empty reference 1 if the prediction is empty too, else 0.
    """
    check_references(references)
    return max(max(0.0, 1 - edit_distance(prediction, text) / max(len(text), 1)) for text in references)


def anls(prediction: str, references: Sequence[str]) -> float:
    """Return the normalised Levenshtein similarity of one answer (Biten et al. 2019), as DocVQA's evaluation does.

    ``1 - edit distance / length of the longer text``, in lower case with white space collapsed, of the best reference;
    0 where that is below `THRESHOLD`. The mean over samples is ANLS.

    Returns:
        0 or a number in [0.5, 1].
    """
    check_references(references)
    best = max(_similarity(_plain(prediction), _plain(text)) for text in references)
    return best if best >= THRESHOLD else 0.0


def _similarity(a: str, b: str) -> float:
    return 1 - edit_distance(a, b) / max(len(a), len(b), 1)


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
