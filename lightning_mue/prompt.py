"""What a model reads beside a picture: decoder prompts, as OFA, Donut and BLIP use them, and words on a page (UDOP).

All of it takes tensors or arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

IGNORE = -100
"""Fills up rows of prompts and of labels; no loss counts it."""
Word = tuple[str, tuple[float, float, float, float]]
"""A text that stands on a page, and its box: left, top, right and bottom in thousandths of width and height."""


def read_words(found: object) -> tuple[Word, ...]:
    """Make words of JSON, ``[{"text": "TOTAL", "box": [98, 589, 270, 609]}, ...]``; empty texts are left out.

    Raises:
        ValueError: something else, a box that is none, or no word.
    """
    if not isinstance(found, list) or not all(isinstance(one, dict) and {"text", "box"} <= {*one} for one in found):
        raise ValueError(f"the words must be a list of mappings with `text` and `box`, got {str(found)[:60]!r}")
    words = []
    for one in found:
        box = one["box"]
        if not (isinstance(box, list) and len(box) == 4 and all(isinstance(x, (int, float)) for x in box)):
            raise ValueError(f"the box of {one['text']!r} must be 4 numbers, got {box!r}")
        left, top, right, bottom = box
        if not (0 <= left <= right <= 1000 and 0 <= top <= bottom <= 1000):
            raise ValueError(
                f"the box of {one['text']!r} must be left, top, right and bottom in thousandths of the page, got {box}"
            )
        if isinstance(one["text"], str) and one["text"].strip():
            words.append((" ".join(one["text"].split()), (left, top, right, bottom)))
    if not words:
        raise ValueError("the page has no words")
    return tuple(words)


def read_prompts(inputs: Mapping[str, Any], rows: int, start_id: int) -> list[list[int]]:
    """Return row -> the tokens given: the start token and those of ``decoder_prompt [B, P]``, padding left out.

    Raises:
        ValueError: another number of rows, or padding that is not on the right.
    """
    prompt_BP: Any = inputs.get("decoder_prompt")
    if prompt_BP is None:
        return [[start_id] for _ in range(rows)]
    if prompt_BP.ndim != 2 or len(prompt_BP) != rows:
        raise ValueError(f"`decoder_prompt` must be [{rows}, tokens], got {list(prompt_BP.shape)}")
    lengths = prompt_lengths(prompt_BP)
    if bool(((prompt_BP >= 0).cumprod(1).sum(1) != lengths).any()):
        raise ValueError(
            f"`decoder_prompt` must be padded with {IGNORE} on the right alone; left-padded rows were found"
        )
    return [[start_id, *row[:n]] for row, n in zip(prompt_BP.tolist(), lengths.tolist(), strict=True)]


def prompt_lengths(prompt_BP: Any) -> Any:
    """Return ``[B]``: tokens of each row."""
    return (prompt_BP >= 0).sum(1)


def without_prompt(
    allowed: Callable[[int, Any], list[int]], prompts: Sequence[Sequence[int]]
) -> Callable[[int, Any], list[int]]:
    """Return a constraint on the next token that is shown the start token and the answer so far, not the prompt."""
    return lambda row, ids: allowed(row, ids[[0, *range(len(prompts[row]), len(ids))]])
