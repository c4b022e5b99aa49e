"""Buffers: memory that one decode after another uses. Fresh pages can cost more than what is computed into them."""

from __future__ import annotations

import math
import threading
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
        self._lock = threading.Lock()  # what gives back only appends, and needs none

    def lend(self, owner: Any, shape: tuple[int, ...], dtype: Any) -> Array:
        """Return an array that holds anything; no view of it may outlive ``owner``."""
        size, free = math.prod(shape) * np.dtype(dtype).itemsize, self._free
        with self._lock:
            sizes = [block.nbytes for block in free]
            fitting = [i for i, n in enumerate(sizes) if n >= size]
            chosen = min(fitting or range(len(sizes)), key=sizes.__getitem__, default=None)
            block = None if chosen is None else free.pop(chosen)
        if block is None or block.nbytes < size:
            block = np.empty(size, np.uint8)
        weakref.finalize(owner, free.append, block).atexit = False
        return block[:size].view(dtype).reshape(shape)
