"""Buffers: memory that one decode after another uses. Fresh pages can cost more than what is computed into them."""

from __future__ import annotations

import math
import weakref
from typing import Any

import numpy as np

Array = np.ndarray


class Buffers:
    """Lends arrays until what they were lent to is gone.

    It holds as many blocks as were ever lent at once, and keeps them; a block that is too small makes room for one
    that is not.
    """

    def __init__(self) -> None:
        self._free: list[Array] = []

    def lend(self, owner: Any, shape: tuple[int, ...], dtype: Any) -> Array:
        """Return an array that holds anything; no view of it may outlive ``owner``."""
        size, free = math.prod(shape) * np.dtype(dtype).itemsize, self._free
        fitting = [block for block in free if block.nbytes >= size]
        block = min(fitting or free, key=lambda block: block.nbytes, default=None)
        if block is not None:
            free[:] = [other for other in free if other is not block]
        if block is None or block.nbytes < size:
            block = np.empty(size, np.uint8)
        weakref.finalize(owner, free.append, block).atexit = False
        return block[:size].view(dtype).reshape(shape)
