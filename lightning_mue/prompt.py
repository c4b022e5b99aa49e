"""Decoder prompts: tokens that the decoder is given before it answers, as OFA, Donut and BLIP use them.

All of it takes tensors or arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

IGNORE = -100
"""Fills up rows of prompts and of labels; no loss counts it."""


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
