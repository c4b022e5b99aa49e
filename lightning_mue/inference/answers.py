"""Closed answer sets: decoding may only produce one of given answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor


def only_answers(answers: Sequence[Sequence[int]], end_id: int) -> Callable[[int, Tensor], list[int]]:
    """Return the constraint (transformers' ``prefix_allowed_tokens_fn``) that admits only these answers.

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
    following: dict[tuple[int, ...], set[int]] = {}
    for answer in answers:
        whole = (*answer, end_id)
        for i, token in enumerate(whole):
            following.setdefault(whole[:i], set()).add(token)

    def allowed(_row: int, ids: Tensor) -> list[int]:
        return sorted(following.get(tuple(ids[1:].tolist()), {end_id}))

    return allowed
