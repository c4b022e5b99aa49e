"""ScreenedHead: the vocabulary head of greedy decoding. It reads int8 weights and returns the float32 arg-max.

Weights and states are rounded, ``w = s q + e`` and ``h = t (p + r)`` with integers ``q`` and ``p``. By Cauchy-Schwarz

    ``|w.h - t s q.p|  =  t |w.r + e.p|  <=  t (|w| |r| + |e| |p|)``.

So int8 products give an upper bound of every score. The token with the highest bound is scored exactly; only tokens
whose bound reaches that score can be better, and they are scored exactly as well. Rows for which they are too many are
screened anew: with states in 8 bits, then in 16 bits, at last with states and weights in float32.

Guaranteed: the arg-max of the scores of the float32 weights, summed in float64 and rounded once to float32; the lowest
token where they tie. A float32 head returns the same unless two scores lie within its own rounding errors.

Shapes: ``R`` rows, ``D`` width, ``V`` vocabulary, ``C`` (row, token) pairs scored exactly. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from lightning_mue.inference.int8_product import STATE_LEVELS, WEIGHT_LEVELS, Int8Product, largest_weight

Process = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Rows ``[R]``, scores ``[R, V]`` -> scores ``[R, V]``. It may write into the scores it is given."""

Bounds = tuple[np.ndarray, np.ndarray]
"""Upper bounds ``[R, V]`` of the products, and the unit ``[R]`` in which each row's are given."""

_LIMB = 255
"""States in 16 bits are ``255 high + low``, both limbs in -127..127."""

_SLACK = 2.0**-19
"""Share of ``|w| |h|`` by which a bound is widened: 32 float32 roundings, more than any path below makes."""

_FEW = 128
"""A row is screened anew rather than score more than one in 128 tokens exactly (and a few): there the costs meet."""

_CHUNK = 256
"""Weight rows in float64 at a time: they stay in the cache."""

_LARGEST = 1e20
"""Weights up to here: far from where scaled integer products would overflow."""


class ScreenedHead:
    """The arg-max of ``weight @ h + bias``, from a quarter of the bytes.

    Args:
        weight_VD: float32; kept by reference beside an int8 copy. Whoever changes it makes a new head.
        bias_V: float32 or None; ``-inf`` bars a token.
        threads: of the int8 product; 0 means one per core.
        graph: of ``product_graph`` for this matrix; made here, which needs onnx, if not given.

    Attributes:
        rows: rows asked so far.
        refined_rows: of them, those screened with states in 16 bits too.
        full_rows: of them, those that needed the full float32 head.
        candidates: (row, token) pairs scored exactly, at least one a row.

    Raises:
        ValueError: weights or bias are not float32, not finite or of other shapes.
    """

    def __init__(
        self,
        weight_VD: np.ndarray,
        bias_V: np.ndarray | None = None,
        threads: int = 0,
        graph: bytes | None = None,
    ) -> None:
        _check_weights(weight_VD, bias_V)
        self.rows = self.refined_rows = self.full_rows = self.candidates = 0
        self._weight_VD = weight_VD
        self._bias_V = bias_V if bias_V is not None and bias_V.any() else None
        if self._bias_V is not None:
            self._upper_bias_V = self._bias_V * np.where(self._bias_V < 0, 1 - _SLACK, 1 + _SLACK).astype(np.float32)
        vocabulary, width = weight_VD.shape
        if graph is None:
            from lightning_mue.inference.product_graph import product_graph  # a bundle has the graph, and needs no onnx

            graph = product_graph(vocabulary, width)
        levels = largest_weight(graph, vocabulary, width)
        quantised_VD, scale_V, self._norms_2V = _quantise_weights(weight_VD, levels or WEIGHT_LEVELS[-1])
        self._screens: list[Callable[[np.ndarray], Bounds]] = [self._full]
        if levels is not None:  # else the int8 product is wrong on this machine, and every row is a full one
            self._product = Int8Product(quantised_VD, scale_V, self._norms_2V, threads, graph)
            self._screens = [self._coarse, self._fine, self._full]

    def argmax(self, h_RD: np.ndarray, process: Process | None = None) -> np.ndarray:
        """Return the best token of each row, int64 ``[R]``.

        Args:
            h_RD: float32 states.
            process: logits processors. Each score must be changed by itself, and a higher one must not come out lower:
                masks, forced tokens, repetition penalties, temperatures; not softmax, top-k or top-p. For it is shown
                upper bounds instead of scores, and then ``-inf`` for all tokens that cannot win.

        Raises:
            ValueError: states are not finite or not of the weights' width, or ``process`` is not as said.
        """
        self._check_states(h_RD)
        vocabulary = len(self._weight_VD)
        token_R, open_R = np.full(len(h_RD), -1, np.int64), np.arange(len(h_RD))
        self.rows += len(h_RD)
        for screen in self._screens if len(h_RD) else ():
            most = vocabulary if screen == self._full else vocabulary // _FEW + 16
            token_R[open_R] = found_R = self._settle(screen(h_RD), h_RD, open_R, most, process)
            if found_R.min() >= 0:
                return token_R
            open_R, h_RD = open_R[found_R < 0], h_RD[found_R < 0]
        if len(open_R):
            raise ValueError(
                "`process` must change each score by itself and keep their order; use the full head instead"
            )
        return token_R

    def _coarse(self, h_RD: np.ndarray) -> Bounds:
        """Bounds from states in 8 bits."""
        p_RD, unit_R, sizes_2 = _rounded_states(h_RD, STATE_LEVELS)
        return self._product(p_RD, sizes_2), unit_R

    def _fine(self, h_RD: np.ndarray) -> Bounds:
        """Bounds from states in 16 bits."""
        self.refined_rows += len(h_RD)
        p_RD, unit_R, sizes_2 = _rounded_states(h_RD, _LIMB * STATE_LEVELS + STATE_LEVELS)
        high_RD = np.rint(p_RD / _LIMB)
        limbs_RD = np.concatenate([high_RD, p_RD - _LIMB * high_RD])
        upper_RV, low_RV = np.split(self._product(limbs_RD, sizes_2 / (_LIMB + 1)), 2)  # 255 such errors and one more
        upper_RV *= _LIMB
        upper_RV += low_RV
        return upper_RV, unit_R

    def _full(self, h_RD: np.ndarray) -> Bounds:
        """Bounds from float32, whose sums make at most ``D`` roundings in any order."""
        self.full_rows += len(h_RD)
        error_R = (h_RD.shape[1] * 2.0**-23 + _SLACK) * np.linalg.norm(h_RD.astype(np.float64), axis=1)
        upper_RV = h_RD @ self._weight_VD.T
        upper_RV += np.multiply.outer(error_R.astype(np.float32), self._norms_2V[0])
        return upper_RV, np.ones(len(h_RD), np.float32)

    def _settle(
        self, bounds: Bounds, h_RD: np.ndarray, rows_R: np.ndarray, most: int, process: Process | None
    ) -> np.ndarray:
        """Return tokens ``[R]``; -1 where more than ``most`` tokens (or none, which breaks a promise) may be best."""
        upper_RV, unit_R = bounds
        if self._bias_V is not None:
            upper_RV += self._upper_bias_V / unit_R[:, None]
        if process is not None:
            upper_RV *= unit_R[:, None]
            upper_RV = process(rows_R, upper_RV)
        best_R = upper_RV.argmax(1)
        bar_R = self._scores(h_RD, np.arange(len(h_RD)), best_R, rows_R, process)
        if process is None:
            bar_R = bar_R / unit_R
        reaching_C = np.flatnonzero(upper_RV >= bar_R[:, None])
        if process is None and len(reaching_C) == len(h_RD):
            return best_R
        row_C, token_C = np.divmod(reaching_C, len(self._weight_VD))
        count_R = np.bincount(row_C, minlength=len(h_RD))
        token_R = np.where(count_R == 1, best_R, -1)
        asked_C = ((count_R > 1) & (count_R <= most))[row_C]
        if asked_C.any():
            row_C, token_C = row_C[asked_C], token_C[asked_C]
            score_C = self._scores(h_RD, row_C, token_C, rows_R, process)
            order_C = np.lexsort((-token_C, score_C, row_C))  # the best last, of equals the lowest token
            token_R[row_C[order_C]] = token_C[order_C]  # and the last written stays
        return token_R

    def _scores(
        self, h_RD: np.ndarray, row_C: np.ndarray, token_C: np.ndarray, rows_R: np.ndarray, process: Process | None
    ) -> np.ndarray:
        """Return the exact scores ``[C]`` of pairs, rounded to float32 and processed."""
        self.candidates += len(row_C)
        score_C = np.empty(len(row_C), np.float32)
        for first in range(0, len(row_C), _CHUNK):
            block = slice(first, first + _CHUNK)
            exact_C = (self._weight_VD[token_C[block]] * h_RD[row_C[block]].astype(np.float64)).sum(1)
            score_C[block] = exact_C if self._bias_V is None else exact_C + self._bias_V[token_C[block]]
        if process is None:
            return score_C
        score_RV = np.full((len(h_RD), len(self._weight_VD)), -np.inf, np.float32)
        score_RV[row_C, token_C] = score_C
        return process(rows_R, score_RV)[row_C, token_C]

    def _check_states(self, h_RD: np.ndarray) -> None:
        width = self._weight_VD.shape[1]
        if h_RD.ndim != 2 or h_RD.shape[1] != width or h_RD.dtype != np.float32:
            raise ValueError(f"States must be float32 [R, {width}], got {h_RD.dtype} {list(h_RD.shape)}")
        if not np.isfinite(h_RD).all():
            raise ValueError("States must be finite, got nan or inf: look at the layers below the head")


def _quantise_weights(weight_VD: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return int8 weights, their scales ``[V]`` and the norms ``[2, V]`` of weights and of what is left over."""
    quantised_VD = np.empty(weight_VD.shape, np.int8)
    scale_V = np.empty(len(weight_VD), np.float32)
    norms_2V = np.empty((2, len(weight_VD)))
    for first in range(0, len(weight_VD), _CHUNK):
        block = slice(first, first + _CHUNK)
        q_VD, scale_V[block], rest_VD = _rounded(weight_VD[block], levels)
        quantised_VD[block] = q_VD
        norms_2V[0, block] = np.linalg.norm(weight_VD[block].astype(np.float64), axis=1)
        norms_2V[1, block] = np.linalg.norm(rest_VD.astype(np.float64), axis=1) * scale_V[block]
    norms_2V[1] += _SLACK * norms_2V[0]
    return quantised_VD, scale_V, (norms_2V * (1 + _SLACK)).astype(np.float32)


def _rounded_states(h_RD: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return integer states, their units ``[R]`` and the largest norms ``[2]`` of what is left over and of them."""
    p_RD, unit_R, rest_RD = _rounded(h_RD, levels)
    sizes = [math.sqrt(np.einsum("rd,rd->r", x_RD, x_RD, dtype=np.float64).max()) for x_RD in (rest_RD, p_RD)]
    return p_RD, unit_R, np.array(sizes, np.float32)


def _rounded(x_RD: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return integers within ``levels``, each row's unit, and what rounding left over, in units; all float32."""
    unit_R = np.abs(x_RD).max(1) / np.float32(levels)
    unit_R[unit_R < np.finfo(np.float32).tiny] = 1.0
    rest_RD = x_RD / unit_R[:, None]
    integer_RD = np.rint(rest_RD)
    rest_RD -= integer_RD
    return integer_RD, unit_R, rest_RD


def _check_weights(weight_VD: np.ndarray, bias_V: np.ndarray | None) -> None:
    if weight_VD.ndim != 2 or weight_VD.dtype != np.float32 or 0 in weight_VD.shape:
        raise ValueError(f"Weights must be float32 [V, D], got {weight_VD.dtype} {list(weight_VD.shape)}")
    if not np.abs(weight_VD).max() < _LARGEST:
        raise ValueError(f"Weights must be finite and below {_LARGEST:g}, got nan or larger ones")
    if bias_V is None:
        return
    if bias_V.shape != weight_VD.shape[:1] or bias_V.dtype != np.float32 or not (bias_V < np.inf).all():
        found = f"{bias_V.dtype} {list(bias_V.shape)}, largest {bias_V.max()}"
        raise ValueError(f"`bias_V` must be float32 [{len(weight_VD)}], finite or -inf, got {found}")
