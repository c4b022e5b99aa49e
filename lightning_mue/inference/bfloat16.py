"""Numbers of 16 bits, the upper half of a float32's, as numpy knows them: bits. numba compiles where installed."""

from __future__ import annotations

from typing import Any

import numpy as np

try:
    import numba

    _elementwise: Any = numba.vectorize(cache=True)
except ImportError:

    def _elementwise(function: Any) -> Any:
        return lambda x, out: np.positive(function(x), out=out)


Array = np.ndarray


def to_bfloat16(x: Array, out: Array | None = None) -> Array:
    """Return float32 numbers as bits of bfloat16, in ``out`` if given: to the nearest, ties to even; NaN stays NaN."""
    return _nearest(np.asarray(x, np.float32).view(np.uint32), out=out)


def from_bfloat16(x: Array) -> Array:
    """Return the bits of bfloat16 as the same numbers in float32."""
    return (np.asarray(x, np.uint16).astype(np.uint32) << 16).view(np.float32)


@_elementwise
def _nearest(bits: Any) -> Any:
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.uint16((bits | 0x400000 * is_nan) + (0x7FFF + (bits >> 16 & 1)) * (1 - is_nan) >> 16)
