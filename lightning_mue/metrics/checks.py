"""Checks of what is scored."""

from __future__ import annotations

from collections.abc import Sequence


def check_references(references: Sequence[str]) -> None:
    """Refuse references that are no list, or an empty one.

    Raises:
        ValueError: a single text, or no reference.
    """
    if isinstance(references, str) or not references:
        raise ValueError(f"`references` must be a list of at least one text, got {references!r}")


def check_batch(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Refuse a batch whose predictions and lists of references do not belong together.

    Raises:
        ValueError: their numbers differ, or a prediction has no references.
    """
    if len(predictions) != len(references):
        raise ValueError(f"got {len(predictions)} predictions for {len(references)} lists of references")
    for accepted in references:
        check_references(accepted)
