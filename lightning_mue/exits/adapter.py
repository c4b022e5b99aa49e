"""Adapters: the trainable map between an early state and the shared norm and head."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_mue.exits.config import AdapterKind


class Adapter(nn.Module):
    """``h + f(h)`` with ``f`` zero at the start, so that a new exit is the plain shared head (DEED's adapters).

    Args:
        kind: ``bottleneck`` (norm, down, GELU, up) or ``linear``.
        width: of the states.
        hidden: units of the bottleneck.
    """

    def __init__(self, kind: AdapterKind, width: int, hidden: int) -> None:
        super().__init__()
        last = nn.Linear(hidden if kind == "bottleneck" else width, width)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        down = [nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU()] if kind == "bottleneck" else []
        self.change = nn.Sequential(*down, last)

    def forward(self, h: Tensor) -> Tensor:
        """Map states ``[..., D]`` to states of the same shape."""
        return h + self.change(h)
