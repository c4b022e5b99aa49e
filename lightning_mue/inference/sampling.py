"""Sampling by Gumbel-max: the arg-max of ``z / T + g`` is a sample of ``softmax(z / T)`` if ``g`` is Gumbel noise.

(Gumbel, 1954; Maddison et al., 2014, arXiv 1411.0030.) The noise of a token is a function of a seed, the row, the
position and the token, and of nothing else: it comes from a counter (Philox; Salmon et al., 2011), not from a state.
So a draft and its check see the same noise, and what is drawn does not depend on the order of calls.

Shapes: ``R`` rows, ``V`` vocabulary. No torch here: both runtimes draw the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from operator import index

import numpy as np

_LOWEST = 1e-4
"""Of temperatures: below, scores may leave float32."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; names and meaning as in transformers' generation config.

    Args:
        temperature: scores are divided by it.
        top_k: only so many of the best tokens, and those as good as the last of them; 0: all.
        top_p: only the likeliest tokens that together have this probability, at temperature and ``top_k``; 1: all.
        seed: of the noise: one number, or one for each row, which makes a row's answer that of a batch of it alone.
        rows: whose seeds the rows of a batch have; their own if not given.

    Raises:
        ValueError: a value outside its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | Sequence[int] = 0
    rows: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if not _LOWEST <= self.temperature < math.inf:
            raise ValueError(
                f"`temperature` must be finite and at least {_LOWEST:g} (towards 0 it is greedy decoding: "
                f"`do_sample=False`), got {self.temperature}"
            )
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"`top_k` must be 0 (all tokens) or more and `top_p` in (0, 1], got {self.top_k} and {self.top_p}"
            )
        seeds = [self.seed] if isinstance(self.seed, int) else self.seed
        if not all(0 <= seed < 1 << 128 for seed in seeds):
            raise ValueError(f"`seed` must be in 0..2^128 - 1, got {self.seed}")

    @property
    def is_by_token(self) -> bool:
        """Whether each score is changed by itself: then nobody needs all of them."""
        return self.top_k == 0 and self.top_p == 1.0

    def of_rows(self, rows: Sequence[int]) -> Sampling:
        """Return what draws for these rows of a batch what it draws for them among all."""
        return replace(self, rows=rows)

    def check(self, rows: int) -> None:
        """Compare with a batch.

        Raises:
            ValueError: seeds are not one for each row.
        """
        if not isinstance(self.seed, int) and len(self.seed) != rows:
            raise ValueError(f"`seed` must be one number, or one for each of {rows} rows, got {len(self.seed)}")

    def noise(self, rows: Iterable[int], positions: Iterable[int], vocabulary: int) -> np.ndarray:
        """Return Gumbel noise, float32 ``[R, V]``.

        A row's noise is ``-log(-log(u))`` of ``u = (n + 1/2) / 2^52``, where ``n`` is the upper 52 bits of number ``v``
        of ``Philox(key=seed, counter=[0, position, row, 0])`` for token ``v``; the row is 0 under a seed of its own.

        Args:
            rows: of the batch.
            positions: of the decoder, which choose; the start token has position 0.
            vocabulary: number of tokens.
        """
        each = zip(rows, positions, strict=True)
        return np.stack([self._gumbel(int(row), int(position), vocabulary) for row, position in each])

    def perturbed(self, scores_RV: np.ndarray, noise_RV: np.ndarray) -> np.ndarray:
        """Return ``[R, V]`` whose arg-max is the sample.

        Args:
            scores_RV: float32, processed; ``-inf`` bars a token.
            noise_RV: of ``noise``.
        """
        scores_RV = scores_RV / np.float32(self.temperature)
        if self.top_k:
            scores_RV = best_scores(scores_RV, self.top_k)
        if self.top_p < 1:
            scores_RV = likeliest(scores_RV, self.top_p)
        return scores_RV + noise_RV

    def _gumbel(self, row: int, position: int, vocabulary: int) -> np.ndarray:
        row = row if self.rows is None else self.rows[row]
        seed, row = (self.seed, row) if isinstance(self.seed, int) else (self.seed[row], 0)
        words_V = np.random.Philox(key=seed, counter=[0, position, row, 0]).random_raw(vocabulary)
        u_V = ((words_V >> np.uint64(12)) + 0.5) * 2.0**-52
        return (-np.log(-np.log(u_V))).astype(np.float32)


def best_scores(scores_RV: np.ndarray, top_k: int) -> np.ndarray:
    """Return scores with ``-inf`` for those below the ``top_k``-th (transformers' ``TopKLogitsWarper``)."""
    if top_k >= scores_RV.shape[1]:
        return scores_RV
    bar_R1 = np.partition(scores_RV, -top_k, axis=1)[:, -top_k, None]
    return np.where(scores_RV < bar_R1, np.float32(-np.inf), scores_RV)


def likeliest(scores_RV: np.ndarray, top_p: float) -> np.ndarray:
    """Return scores with ``-inf`` for the least likely tokens, as many as together have probability ``1 - top_p``.

    As transformers' ``TopPLogitsWarper`` does, but summed in float64, and of equal tokens all go or stay. The likeliest
    stays.
    """
    sorted_RV = np.sort(scores_RV, axis=1)
    mass_RV = np.exp(sorted_RV - sorted_RV[:, -1:]).cumsum(1, dtype=np.float64)
    gone_R1 = (mass_RV[:, :-1] <= (1 - top_p) * mass_RV[:, -1:]).sum(1, keepdims=True)
    bar_R1 = np.take_along_axis(sorted_RV, gone_R1, 1)
    return np.where(scores_RV < bar_R1, np.float32(-np.inf), scores_RV)


def sampling_settings(
    do_sample: bool, temperature: float, top_k: int, top_p: float, seed: int | Sequence[int], num_beams: int
) -> Sampling | None:
    """Return how tokens are drawn, or None where the best are asked for.

    Raises:
        ValueError: settings of sampling without it, or beams with it.
    """
    seeds = [index(one) for one in seed] if isinstance(seed, Iterable) else index(seed)  # numpy's integers too
    asked = Sampling(temperature, top_k, top_p, seeds)
    if not do_sample:
        if asked != Sampling():
            raise ValueError("`temperature`, `top_k`, `top_p` and `seed` are of sampling: ask for `do_sample=True`.")
        return None
    if num_beams != 1:
        raise ValueError(f"Beams are searched and not drawn: `do_sample=True` needs num_beams=1, got {num_beams}.")
    return asked
