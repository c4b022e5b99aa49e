"""Where the time of a generation goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_NOTHING = nullcontext()


class Stopwatch:
    """Adds up milliseconds by part.

    Args:
        device: on CUDA the clock waits for the device at the borders of a part, so that parts are true (and the whole
            is a little slower); None: there is none, and no torch either.
        enabled: False records nothing and costs nothing.
    """

    def __init__(self, device: torch.device | None, enabled: bool) -> None:
        self._sync = enabled and device is not None and device.type == "cuda"
        self._enabled = enabled
        self.ms: dict[str, float] = {}

    def part(self, name: str) -> AbstractContextManager[None]:
        """Add the time of the block to ``name``."""
        return self._measure(name) if self._enabled else _NOTHING

    @contextmanager
    def _measure(self, name: str) -> Iterator[None]:
        begin = self._now()
        try:
            yield
        finally:
            self.ms[name] = self.ms.get(name, 0.0) + self._now() - begin

    def _now(self) -> float:
        if self._sync:
            import torch

            torch.cuda.synchronize()
        return time.perf_counter() * 1e3
