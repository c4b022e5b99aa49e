"""What a generation gave."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class ExitOutput:
    """What a generation gave.

    Args:
        sequences: token ids ``[B, 1 + T]``: start token, answer, end token, padding; as transformers returns them, but
            without the decoder prompt.
        exit_depths: stream name -> depths, ``[B]`` for streams left once per sample, ``[B, T]`` for the decoder
            (0 where a row had ended).
        layer_runs: stream name -> layer executions (calls).
        prompt_lengths: tokens of each row's decoder prompt, ``[B]``.
        pairs: computed (position, layer) pairs of the decoder, its prompts' among them.
        filled: pairs whose K/V were made up instead (other than just-in-time).
        timings: part -> milliseconds: one per stream, ``embed``, ``layers``, ``memory`` (cross-attention projection),
            ``signals``, ``head``, and ``total``; empty if they were not asked for.
        drafted: tokens that the last layer was asked to settle, under a verified policy.
        agreed: of them, those that it would have chosen itself.
    """

    sequences: Tensor
    exit_depths: dict[str, Tensor]
    layer_runs: dict[str, int]
    prompt_lengths: Tensor
    pairs: int
    filled: int
    timings: dict[str, float]
    drafted: int = 0
    agreed: int = 0


def joined(parts: Sequence[tuple[list[int], ExitOutput]], size: int, pad_id: int) -> ExitOutput:
    """Return the output of a batch whose rows were answered apart.

    Args:
        parts: the rows of each, and their output.
        size: of the batch.
        pad_id: ends sequences shorter than the longest.
    """
    first = parts[0][1]
    depths = {
        name: _scattered([(rows, out.exit_depths[name]) for rows, out in parts], size, 0) for name in first.exit_depths
    }
    timings: Counter[str] = Counter()
    layer_runs: Counter[str] = Counter()
    for _, out in parts:
        timings.update(out.timings)
        layer_runs.update(out.layer_runs)
    return ExitOutput(
        _scattered([(rows, out.sequences) for rows, out in parts], size, pad_id),
        depths,
        dict(layer_runs),
        _scattered([(rows, out.prompt_lengths) for rows, out in parts], size, 0),
        sum(out.pairs for _, out in parts),
        sum(out.filled for _, out in parts),
        dict(timings),
        sum(out.drafted for _, out in parts),
        sum(out.agreed for _, out in parts),
    )


def _scattered(parts: Sequence[tuple[list[int], Any]], size: int, fill: int) -> Any:
    """Return ``[size, ...]`` with each part in its rows, shorter ones filled up on the right; of their own kind."""
    one = parts[0][1]
    whole = np.full((size, *max(part.shape[1:] for _, part in parts)), fill, np.int64)
    for rows, part in parts:
        place: Any = (rows, *(slice(length) for length in part.shape[1:]))
        whole[place] = part.tolist()
    return whole if isinstance(one, np.ndarray) else one.new_tensor(whole)
