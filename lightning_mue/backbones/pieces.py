"""A decoder layer cut at its two attentions: what a runtime of graphs needs, which keeps K/V itself.

Between attentions each position is alone. So the pieces are modules over flat states ``[N, D]``, a row for each of the
positions, of whatever samples, that are computed together. They hold the backbone's own submodules and no weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class LayerPieces:
    """One decoder layer.

    Args:
        before: states -> query (scaled), key and value of self-attention, each ``[N, D]``.
        between: states, what self-attention read -> states, query (scaled) of cross-attention.
        after: states, what cross-attention read -> states.
        memory: memory ``[B, S, D]`` -> key and value of cross-attention, each ``[B, heads, S, D / heads]``.
    """

    before: nn.Module
    between: nn.Module
    after: nn.Module
    memory: nn.Module

    def named(self) -> dict[str, nn.Module]:
        """Return name -> module."""
        return {"before": self.before, "between": self.between, "after": self.after, "memory": self.memory}


def bart_pieces(layer: Any, heads: int, prenorm: bool) -> LayerPieces:
    """Return the pieces of a ``BartDecoderLayer`` (post-norm) or ``MBartDecoderLayer`` (pre-norm)."""
    before, inside = (nn.Identity(), layer.self_attn_layer_norm)
    between, outside = (nn.Identity(), layer.encoder_attn_layer_norm)
    after, last = (nn.Identity(), layer.final_layer_norm)
    if prenorm:
        before, inside, between, outside, after, last = inside, before, outside, between, last, after
    cross = layer.encoder_attn
    return LayerPieces(
        _Before(before, layer.self_attn),
        _Between(layer.self_attn.out_proj, inside, between, cross),
        _After(cross.out_proj, outside, after, layer, last),
        _Memory(cross, heads),
    )


class _Before(nn.Module):
    def __init__(self, norm: nn.Module, attention: Any) -> None:
        super().__init__()
        self.norm, self.scale = norm, attention.scaling
        self.query, self.key, self.value = attention.q_proj, attention.k_proj, attention.v_proj

    def forward(self, h_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_ND = self.norm(h_ND)
        return self.query(x_ND) * self.scale, self.key(x_ND), self.value(x_ND)


class _Between(nn.Module):
    def __init__(self, out: nn.Module, norm: nn.Module, next_norm: nn.Module, attention: Any) -> None:
        super().__init__()
        self.out, self.norm, self.next_norm = out, norm, next_norm
        self.query, self.scale = attention.q_proj, attention.scaling

    def forward(self, h_ND: Tensor, read_ND: Tensor) -> tuple[Tensor, Tensor]:
        h_ND = self.norm(h_ND + self.out(read_ND))
        return h_ND, self.query(self.next_norm(h_ND)) * self.scale


class _After(nn.Module):
    def __init__(self, out: nn.Module, norm: nn.Module, next_norm: nn.Module, layer: Any, last: nn.Module) -> None:
        super().__init__()
        self.out, self.norm, self.next_norm, self.last = out, norm, next_norm, last
        self.up, self.activation, self.down = layer.fc1, layer.activation_fn, layer.fc2

    def forward(self, h_ND: Tensor, read_ND: Tensor) -> Tensor:
        h_ND = self.norm(h_ND + self.out(read_ND))
        result_ND: Tensor = self.last(h_ND + self.down(self.activation(self.up(self.next_norm(h_ND)))))
        return result_ND


class _Memory(nn.Module):
    def __init__(self, attention: Any, heads: int) -> None:
        super().__init__()
        self.key, self.value, self.heads = attention.k_proj, attention.v_proj, heads

    def forward(self, memory_BSD: Tensor) -> tuple[Tensor, Tensor]:
        shape, flat_ND = (*memory_BSD.shape[:2], self.heads, -1), memory_BSD.flatten(0, 1)
        return self.key(flat_ND).view(shape).transpose(1, 2), self.value(flat_ND).view(shape).transpose(1, 2)
