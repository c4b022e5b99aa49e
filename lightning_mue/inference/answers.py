"""Closed answer sets: decoding may only produce one of given answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_mue.policy import ExitPolicy


class ClosedAnswers:
    """The constraint (transformers' ``prefix_allowed_tokens_fn``) that admits only some answers.

    Args:
        answers: token ids of each answer, without start and end tokens.
        end_id: ends every answer.

    Attributes:
        tokens: all that may ever be chosen; a head need score no others.
    """

    def __init__(self, answers: Sequence[Sequence[int]], end_id: int) -> None:
        self._following: dict[tuple[int, ...], set[int]] = {}
        for answer in answers:
            whole = (*answer, end_id)
            for i, token in enumerate(whole):
                self._following.setdefault(whole[:i], set()).add(token)
        self._end_id, self.tokens = end_id, sorted({end_id}.union(*self._following.values()))

    def __call__(self, row: int, ids: Any) -> list[int]:
        """Return what may follow a start token and what has been answered."""
        return sorted(self._following.get(tuple(ids[1:].tolist()), {self._end_id}))


def only_answers(answers: Sequence[Sequence[int]], end_id: int) -> ClosedAnswers:
    """Return the constraint that admits only these answers.

    With answers of one token each, greedy decoding under it picks the answer of highest likelihood, as OFA does for
    visual entailment.

    Args:
        answers: token ids of each answer, without start and end tokens.
        end_id: ends every answer.

    Raises:
        ValueError: no answer, or an empty one.
    """
    if not answers or not all(answers):
        raise ValueError(f"A closed answer set needs answers of at least one token, got {list(map(list, answers))}")
    return ClosedAnswers(answers, end_id)


def calibrated_answers(policy: ExitPolicy, processor: Any, end_id: int) -> ClosedAnswers | None:
    """Return the constraint to the closed answers under which a policy was certified, or None.

    Args:
        policy: that may have a certificate.
        processor: its ``labels`` are texts as token ids ``[B, T]``, filled up with negative ones.
        end_id: ends every answer.
    """
    answers = policy.certificate.decode.get("answers") if policy.certificate is not None else None
    if not answers:
        return None
    labels = processor.labels(answers)
    return only_answers([[int(t) for t in row if t >= 0 and t != end_id] for row in labels], end_id)
