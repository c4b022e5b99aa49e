"""ROUGE-L as COCO's caption evaluation computes it."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_mue.metrics.checks import check_references

BETA = 1.2
"""How much more recall counts than precision."""


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """Score one caption by its longest common subsequences with the references (Lin 2004, section 3.1).

    The best precision and the best recall may come from different references. ``torchmetrics.text.ROUGEScore`` is
    another number: it weights precision and recall equally, takes both from one reference, and tokenises by itself.

    Args:
        prediction: the caption, tokens joined by spaces. An empty text counts as one empty token, as in COCO's code.
        references: likewise, at least one.

    Returns:
        A number in [0, 1].
    """
    check_references(references)
    words, others = prediction.split() or [""], [reference.split() or [""] for reference in references]
    common = [_longest_common_subsequence(words, other) for other in others]
    precision = max(common) / len(words)
    recall = max(length / len(other) for length, other in zip(common, others, strict=True))
    if not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    lengths = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0  # of the row above, one to the left
        for j, other in enumerate(b, 1):
            diagonal, lengths[j] = lengths[j], diagonal + 1 if word == other else max(lengths[j], lengths[j - 1])
    return lengths[-1]
