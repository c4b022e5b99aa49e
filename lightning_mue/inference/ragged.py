"""Ragged attention: single queries over K/V caches that never move. numpy alone; numba compiles it where installed.

Shapes: ``N`` pairs of a row and a position, ``B`` batch, ``H`` heads, ``T`` positions kept, ``d`` head size, ``J``
pairs of a run. A run is adjacent pairs of one row and one length: K and V come from memory once for all of them.
Compiled, what a pair gets depends, to the last bit, on its query, its length and its row's K and V alone.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any

import numpy as np

from lightning_mue.inference.bfloat16 import from_bfloat16

try:
    import numba
    from llvmlite import ir
    from numba.core import cgutils
    from numba.extending import intrinsic, overload

    COMPILED = True
except ImportError:  # every call goes through numpy
    COMPILED = False

Array = np.ndarray
_LONGEST_RUN = 8
_FEW = 1 << 20  # numbers of K and V; below, handing over to a thread costs more than it saves
_AHEAD = 1024  # bytes; one thread comes near the memory's bandwidth only if it asks this early
_LOWEST = np.float32(-64)  # weights below e to this are exactly 0: no float32 sum sees them, and subnormals are slow
_LOG2_E = np.float32(math.log2(math.e))
_LN2 = np.float32(0.693359375), np.float32(math.log(2) - 0.693359375)  # products of the first's 9 bits are exact
_SERIES = tuple(np.float32(1 / math.factorial(n)) for n in range(6, -1, -1))
_NO_BIAS = np.empty((0, 0), np.float32)
_TYPES = {tuple(np.dtype(name) for name in ("f4", kv, kv, "i8", "i8", "f4", "f4", "f4", "f4")) for kv in ("f4", "u2")}


def attend(
    q_NHd: Array,
    keys_BHTd: Array,
    values_BHTd: Array,
    rows_N: Any,
    lengths_N: Any,
    bias_BT: Array | None = None,
    out_NHd: Array | None = None,
    threads: int = 1,
    back_HT: Array | None = None,
    logsum_NH: Array | None = None,
) -> Array:
    """Return ``softmax(q . k + bias) v`` of every pair, over positions ``0 .. length - 1`` of its row.

    Args:
        q_NHd: float32 queries, scaled already.
        keys_BHTd: float32, or uint16 holding the bits of bfloat16; contiguous. What lies past the lengths is not read.
        values_BHTd: of the keys' type and shape.
        rows_N: row of each pair; pairs of one row and one length are best adjacent.
        lengths_N: how many positions each pair sees, at least 1.
        bias_BT: float32, added to the scores of all heads; ``-inf`` or float32's minimum masks; contiguous.
        out_NHd: float32, written and returned; contiguous; may be the queries. Default: a new array.
        threads: they share the heads; where there is little to do it is one.
        back_HT: float32, added to each head's score of the position so many before a pair's last one.
        logsum_NH: float32, contiguous; the logarithm of each softmax's denominator is written there.

    Raises:
        TypeError: an array of another type.
        ValueError: arrays that do not fit; a row or a length that is not there.
    """
    rows_N, lengths_N = np.ascontiguousarray(rows_N, np.int64), np.ascontiguousarray(lengths_N, np.int64)
    bias_BT = _NO_BIAS if bias_BT is None else bias_BT
    back_HT = _NO_BIAS if back_HT is None else np.ascontiguousarray(back_HT)
    out_NHd = np.empty(q_NHd.shape, np.float32) if out_NHd is None else out_NHd
    pairs = np.ascontiguousarray(q_NHd), keys_BHTd, values_BHTd, rows_N, lengths_N
    arrays = *pairs, bias_BT, back_HT, out_NHd, _NO_BIAS if logsum_NH is None else logsum_NH
    _check(arrays)
    if not COMPILED:
        _attend_numpy(arrays)
    elif threads == 1 or 2 * lengths_N.sum() * math.prod(q_NHd.shape[1:]) < _FEW:
        _attend_part(arrays, 0, 1)
    else:
        list(_pool(threads, os.getpid()).map(lambda part: _attend_part(arrays, part, threads), range(threads)))
    return out_NHd


def _check(arrays: tuple[Array, ...]) -> None:
    """Refuse what the compiled code, which looks at no bounds, would misread."""
    _, keys_BHTd, values_BHTd, rows_N, lengths_N, bias_BT, back_HT, out_NHd, logsum_NH = arrays
    if (types := tuple(array.dtype for array in arrays)) not in _TYPES:
        names = ", ".join(str(kind) for kind in types if kind != np.int64)
        raise TypeError(f"queries, keys, values, bias, out must be float32 (or K and V uint16: bfloat16), got {names}")
    N, (B, H, T, d) = len(rows_N), keys_BHTd.shape if keys_BHTd.ndim == 4 else (-1,) * 4
    biases = (B, T) if bias_BT.size else (0, 0), (H, T) if back_HT.size else (0, 0)
    found, sums = tuple(array.shape for array in arrays), (0, 0) if logsum_NH is _NO_BIAS else (N, H)
    if found != ((N, H, d), (B, H, T, d), (B, H, T, d), (N,), (N,), *biases, (N, H, d), sums):
        raise ValueError(
            "queries and out must be [N, H, d], keys and values [B, H, T, d], rows and lengths [N], biases [B, T] and "
            "[H, T], sums [N, H]; got {0} and {7}, {1} and {2}, {3} and {4}, {5} and {6}, {8}".format(*found)
        )
    if not all(array.flags.c_contiguous for array in (keys_BHTd, values_BHTd, bias_BT, out_NHd, logsum_NH)):
        raise ValueError("keys, values, bias, out and sums must be contiguous: whole buffers, `lengths_N` cuts them")
    if (n := _first_wrong(rows_N, lengths_N, B, T)) >= 0:
        raise ValueError(f"rows must be 0 .. {B - 1}, lengths 1 .. {T}; pair {n} has {rows_N[n]} and {lengths_N[n]}")


@lru_cache
def _pool(workers: int, process: int) -> ThreadPoolExecutor:
    """Return the threads of this process; a forked one cannot use its parent's."""
    return ThreadPoolExecutor(workers, "attend")


def _attend_numpy(arrays: tuple[Array, ...]) -> None:
    q_NHd, keys_BHTd, values_BHTd, rows_N, lengths_N, bias_BT, back_HT, out_NHd, logsum_NH = arrays
    widen = from_bfloat16 if keys_BHTd.dtype == np.uint16 else np.asarray
    stop = 0
    while stop < len(rows_N):
        start, stop = stop, _end_of_run(rows_N, lengths_N, stop)
        row, length = rows_N[start], lengths_N[start]
        k_HTd, v_HTd = widen(keys_BHTd[row, :, :length]), widen(values_BHTd[row, :, :length])
        weights_HJT = q_NHd[start:stop].swapaxes(0, 1) @ k_HTd.swapaxes(1, 2)
        weights_HJT += bias_BT[row, :length] if bias_BT.size else 0
        weights_HJT += back_HT[:, None, length - 1 :: -1] if back_HT.size else 0
        weights_HJT -= (largest_HJ1 := weights_HJT.max(-1, keepdims=True))
        weights_HJT = np.exp(weights_HJT)
        weights_HJT /= (total_HJ1 := weights_HJT.sum(-1, keepdims=True))
        if logsum_NH.size:
            logsum_NH[start:stop] = (largest_HJ1 + np.log(total_HJ1))[..., 0].T
        out_NHd[start:stop] = (weights_HJT @ v_HTd).swapaxes(0, 1)


def _compiled(**options: Any) -> Any:
    """Compile, once per machine. Sums may be reordered and so run in vectors; NaN and infinity stay what they are."""
    settings: Any = {"nogil": True, "cache": True, "fastmath": {"reassoc", "contract", "nsz"}} | options
    return numba.njit(**settings) if COMPILED else lambda function: function


_instruction: Any = intrinsic if COMPILED else lambda function: function
_one_for_each_type: Any = partial(overload, inline="always", strict=False) if COMPILED else lambda _: _instruction


@_instruction
def _prefetch(context: Any, x: Any, offset: Any) -> Any:
    """Ask for the cache line so many bytes after the start of an array, be it past its end."""

    def write(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        start = builder.bitcast(context.make_array(signature.args[0])(context, builder, arguments[0]).data, byte)
        builder.call(prefetch, [builder.gep(start, [arguments[1]]), word(0), word(3), word(1)])  # read, into L1, data
        return context.get_dummy_value()

    return numba.types.void(x, numba.types.intp), write


@_compiled()
def _first_wrong(rows_N: Array, lengths_N: Array, batch: int, positions: int) -> int:
    """Return the first pair outside the caches, or -1."""
    for n in range(len(rows_N)):
        if not (0 <= rows_N[n] < batch and 1 <= lengths_N[n] <= positions):
            return n
    return -1


@_compiled()
def _end_of_run(rows_N: Array, lengths_N: Array, start: int) -> int:
    stop, last = start + 1, min(len(rows_N), start + _LONGEST_RUN)
    while stop < last and rows_N[stop] == rows_N[start] and lengths_N[stop] == lengths_N[start]:
        stop += 1
    return stop


@_compiled()
def _attend_part(arrays: tuple[Array, ...], part: int, parts: int) -> None:
    """Do every ``parts``-th head. What it calls is inlined, lest a later process links another build of it."""
    q_NHd, keys_BHTd, values_BHTd, rows_N, lengths_N, bias_BT, back_HT, out_NHd, logsum_NH = arrays
    N, H, d = q_NHd.shape
    q_Jd, mixed_Jd = np.empty((_LONGEST_RUN, d), np.float32), np.empty((_LONGEST_RUN, d), np.float32)
    weights_JT, wide_4d = np.empty((_LONGEST_RUN, keys_BHTd.shape[2]), np.float32), np.empty((4, d), np.float32)
    stop = 0
    while stop < N:
        start, stop = stop, _end_of_run(rows_N, lengths_N, stop)
        row, length, pairs = rows_N[start], lengths_N[start], stop - start
        for head in range(part, H, parts):
            q_Jd[:pairs], mixed_Jd[:pairs] = q_NHd[start:stop, head], 0
            if d == 64:  # the usual size: a constant unrolls the innermost loops
                _score(q_Jd, keys_BHTd[row, head], wide_4d, weights_JT, pairs, length, 64)
            else:
                _score(q_Jd, keys_BHTd[row, head], wide_4d, weights_JT, pairs, length, d)
            for j in range(pairs):
                if bias_BT.size:
                    weights_JT[j, :length] += bias_BT[row, :length]
                if back_HT.size:
                    weights_JT[j, :length] += back_HT[head, length - 1 :: -1]
                logsum = _softmax(weights_JT[j], length)
                if logsum_NH.size:
                    logsum_NH[start + j, head] = logsum
            if d == 64:
                _mix(weights_JT, values_BHTd[row, head], wide_4d, mixed_Jd, pairs, length, 64)
            else:
                _mix(weights_JT, values_BHTd[row, head], wide_4d, mixed_Jd, pairs, length, d)
            out_NHd[start:stop, head] = mixed_Jd[:pairs]


@_compiled(inline="always")
def _score(q_Jd: Array, k_Td: Array, wide_4d: Array, out_JT: Array, pairs: int, length: int, d: int) -> None:
    """Write ``q . k``; in four streams, a quarter of the positions each, for memory serves them better than one."""
    quarter = length // 4
    for t in range(quarter):
        t1, t2, t3 = t + quarter, t + 2 * quarter, t + 3 * quarter
        k0, k1 = _read(k_Td[t], wide_4d[0], d), _read(k_Td[t1], wide_4d[1], d)
        k2, k3 = _read(k_Td[t2], wide_4d[2], d), _read(k_Td[t3], wide_4d[3], d)
        for j in range(pairs):
            s0 = s1 = s2 = s3 = np.float32(0)
            for i in range(d):
                s0 += q_Jd[j, i] * k0[i]
                s1 += q_Jd[j, i] * k1[i]
                s2 += q_Jd[j, i] * k2[i]
                s3 += q_Jd[j, i] * k3[i]
            out_JT[j, t], out_JT[j, t1], out_JT[j, t2], out_JT[j, t3] = s0, s1, s2, s3
    for t in range(4 * quarter, length):
        k0 = _read(k_Td[t], wide_4d[0], d)
        for j in range(pairs):
            s0 = np.float32(0)
            for i in range(d):
                s0 += q_Jd[j, i] * k0[i]
            out_JT[j, t] = s0


@_compiled(inline="always")
def _mix(weights_JT: Array, v_Td: Array, wide_4d: Array, out_Jd: Array, pairs: int, length: int, d: int) -> None:
    """Add the weighted values, in the same streams."""
    quarter = length // 4
    for t in range(quarter):
        t1, t2, t3 = t + quarter, t + 2 * quarter, t + 3 * quarter
        v0, v1 = _read(v_Td[t], wide_4d[0], d), _read(v_Td[t1], wide_4d[1], d)
        v2, v3 = _read(v_Td[t2], wide_4d[2], d), _read(v_Td[t3], wide_4d[3], d)
        for j in range(pairs):
            w0, w1, w2, w3 = weights_JT[j, t], weights_JT[j, t1], weights_JT[j, t2], weights_JT[j, t3]
            for i in range(d):
                out_Jd[j, i] += (w0 * v0[i] + w1 * v1[i]) + (w2 * v2[i] + w3 * v3[i])
    for t in range(4 * quarter, length):
        v0 = _read(v_Td[t], wide_4d[0], d)
        for j in range(pairs):
            for i in range(d):
                out_Jd[j, i] += weights_JT[j, t] * v0[i]


def _read(x_d: Array, wide_d: Array, d: int) -> Array:
    """Return float32 as it is, the bits of bfloat16 as float32 in ``wide_d``; ask for what comes later."""
    return x_d if x_d.dtype == np.float32 else from_bfloat16(x_d)  # in words; numba takes the one for its type below


@_one_for_each_type(_read)
def _read_type(x_d: Any, wide_d: Any, d: Any) -> Any:
    def bits(x_d: Array, wide_d: Array, d: int) -> Array:
        for offset in range(_AHEAD, _AHEAD + 2 * d, 64):
            _prefetch(x_d, offset)
        for i in range(d):
            wide_d[i] = np.uint32(np.uint32(x_d[i]) << np.uint32(16)).view(np.float32)
        return wide_d

    def floats(x_d: Array, wide_d: Array, d: int) -> Array:
        for offset in range(_AHEAD, _AHEAD + 4 * d, 64):
            _prefetch(x_d, offset)
        return x_d

    return bits if x_d.dtype == numba.uint16 else floats


@_compiled(inline="always")
def _softmax(x_T: Array, length: int) -> Any:
    """Turn scores into weights; return their sum's logarithm. The largest in four chains: one would wait for itself."""
    m0 = m1 = m2 = m3 = x_T[0]
    for t in range(0, length - 3, 4):
        m0, m1, m2, m3 = max(m0, x_T[t]), max(m1, x_T[t + 1]), max(m2, x_T[t + 2]), max(m3, x_T[t + 3])
    for t in range(length - length % 4, length):
        m0 = max(m0, x_T[t])
    largest, total = max(max(m0, m1), max(m2, m3)), np.float32(0)
    for t in range(length):
        x_T[t] = _exp(x_T[t] - largest)
        total += x_T[t]
    for t in range(length):
        x_T[t] /= total
    return largest + np.log(total)


@_compiled(fastmath={"contract"})  # reordering would undo the two-part logarithm
def _exp(x: Any) -> Any:
    """Return e to a number that is not positive: a power of 2 times the series of the rest, between -.35 and .35."""
    bounded = max(x, _LOWEST)
    power = np.int32(bounded * _LOG2_E - np.float32(0.5))
    rest = bounded - np.float32(power) * _LN2[0] - np.float32(power) * _LN2[1]
    series = np.float32(0)
    for coefficient in _SERIES:
        series = series * rest + coefficient
    scale = np.int32((power + np.int32(127)) << np.int32(23)).view(np.float32)
    return np.float32(0) if x < _LOWEST else series * scale
