"""A decoder layer cut at its two attentions: what a runtime of graphs needs, which keeps K/V itself.

Between attentions each position is alone. So the pieces are modules over flat states ``[N, D]``, a row for each of the
positions, of whatever samples, that are computed together. They hold the backbone's own submodules and no weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.models.t5gemma2.modeling_t5gemma2 import apply_rotary_pos_emb

from lightning_mue.backbones.turns import Turns


class NoPieces(ValueError):
    """A decoder that a runtime of graphs does not run."""


@dataclass(frozen=True)
class LayerPieces:
    """One decoder layer.

    Args:
        before: states -> query (scaled), key and value of self-attention, each ``[N, heads * d]``.
        between: states, what self-attention read -> states, query (scaled) of cross-attention.
        after: states, what cross-attention read -> states.
        memory: memory ``[B, S, D]`` -> key and value of cross-attention, each ``[B, heads, S, d]``.

        reads_positions: ``before`` is given them too, int64 ``[N, 1]``.

    A layer without cross-attention has neither ``between`` nor ``memory``; ``after`` takes what self-attention read.
    One with ``memory`` alone reads tokens and memory in one attention. Where ``before`` gives more queries than keys,
    the first query of each key comes first, then the second of each.
    """

    before: nn.Module
    between: nn.Module | None
    after: nn.Module
    memory: nn.Module | None
    reads_positions: bool = False

    def named(self) -> dict[str, nn.Module]:
        """Return name -> module."""
        parts = {"before": self.before, "between": self.between, "after": self.after, "memory": self.memory}
        return {name: part for name, part in parts.items() if part is not None}


def bart_pieces(layer: Any, heads: int, prenorm: bool) -> LayerPieces:
    """Return the pieces of a ``BartDecoderLayer`` or ``TrOCRDecoderLayer`` (post-norm), or ``MBartDecoderLayer``."""
    before, inside = (nn.Identity(), layer.self_attn_layer_norm)
    between, outside = (nn.Identity(), layer.encoder_attn_layer_norm)
    after, last = (nn.Identity(), layer.final_layer_norm)
    if prenorm:
        before, inside, between, outside, after, last = inside, before, outside, between, last, after
    own, cross = layer.self_attn, layer.encoder_attn
    mlp = nn.Sequential(layer.fc1, layer.activation_fn, layer.fc2)
    return LayerPieces(
        _Before(before, own.q_proj, own.k_proj, own.v_proj, own.scaling),
        _Between(own.out_proj, inside, between, cross.q_proj, cross.scaling),
        _After(cross.out_proj, outside, after, mlp, last),
        _Memory(cross.k_proj, cross.v_proj, heads),
    )


def blip_pieces(layer: Any, heads: int) -> LayerPieces:
    """Return the pieces of a ``BlipTextLayer`` with cross-attention, which is post-norm."""
    own, cross, nothing = layer.attention, layer.crossattention, nn.Identity()
    scale, mlp = own.self.attention_head_size**-0.5, nn.Sequential(layer.intermediate, layer.output.dense)
    return LayerPieces(
        _Before(nothing, own.self.query, own.self.key, own.self.value, scale),
        _Between(own.output.dense, own.output.LayerNorm, nothing, cross.self.query, scale),
        _After(cross.output.dense, cross.output.LayerNorm, nothing, mlp, layer.output.LayerNorm),
        _Memory(cross.self.key, cross.self.value, heads),
    )


def t5_pieces(block: Any, heads: int) -> LayerPieces:
    """Return the pieces of a ``T5Block`` or ``UdopBlock`` of a decoder."""
    (first, second, third), nothing = block.layer, nn.Identity()
    own, cross = first.SelfAttention, second.EncDecAttention
    return LayerPieces(
        _Before(first.layer_norm, own.q, own.k, own.v, own.scaling),
        _Between(own.o, nothing, second.layer_norm, cross.q, cross.scaling),
        _After(cross.o, nothing, third.layer_norm, third.DenseReluDense, nothing),
        _Memory(cross.k, cross.v, heads),
    )


def t5gemma2_pieces(layer: Any, turns: Turns) -> LayerPieces:
    """Return the pieces of a ``T5Gemma2DecoderLayer`` whose positions turn so."""
    own, nothing = layer.self_attn, nn.Identity()
    out = nn.Sequential(_Regrouped(own), own.o_proj, layer.post_self_attn_layernorm)
    mlp = nn.Sequential(layer.mlp, layer.post_feedforward_layernorm)
    return LayerPieces(
        _Turned(layer.pre_self_attn_layernorm, own, turns),
        None,
        _After(out, nothing, layer.pre_feedforward_layernorm, mlp, nothing),
        _NormedMemory(own),
        reads_positions=True,
    )


def gpt2_pieces(block: Any, heads: int) -> LayerPieces:
    """Return the pieces of a ``GPT2Block`` with cross-attention."""
    own, cross, nothing = block.attn, block.crossattention, nn.Identity()
    return LayerPieces(
        _BeforeOfGPT2(block.ln_1, own),
        _Between(own.c_proj, nothing, block.ln_cross_attn, cross.q_attn, cross.scaling),
        _After(cross.c_proj, nothing, block.ln_2, block.mlp, nothing),
        _MemoryOfGPT2(cross, heads),
    )


def coca_pieces(block: Any, cross: Any | None, heads: int) -> LayerPieces:
    """Return the pieces of open_clip's ``ResidualAttentionBlock``, and of the one with cross-attention above it."""
    if cross is None:
        return LayerPieces(_QKV(block, heads), None, _Residual(block), None)
    return LayerPieces(
        _QKV(block, heads), _ResidualAndQuery(block, cross, heads), _Residual(cross), _MemoryOfBlock(cross, heads)
    )


class _Before(nn.Module):
    def __init__(self, norm: nn.Module, query: nn.Module, key: nn.Module, value: nn.Module, scale: float) -> None:
        super().__init__()
        self.norm, self.query, self.key, self.value, self.scale = norm, query, key, value, scale

    def forward(self, h_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_ND = self.norm(h_ND)
        return self.query(x_ND) * self.scale, self.key(x_ND), self.value(x_ND)


class _Between(nn.Module):
    def __init__(self, out: nn.Module, norm: nn.Module, next_norm: nn.Module, query: nn.Module, scale: float) -> None:
        super().__init__()
        self.out, self.norm, self.next_norm, self.query, self.scale = out, norm, next_norm, query, scale

    def forward(self, h_ND: Tensor, read_ND: Tensor) -> tuple[Tensor, Tensor]:
        h_ND = self.norm(h_ND + self.out(read_ND))
        return h_ND, self.query(self.next_norm(h_ND)) * self.scale


class _After(nn.Module):
    def __init__(self, out: nn.Module, norm: nn.Module, next_norm: nn.Module, mlp: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.out, self.norm, self.next_norm, self.mlp, self.last = out, norm, next_norm, mlp, last

    def forward(self, h_ND: Tensor, read_ND: Tensor) -> Tensor:
        h_ND = self.norm(h_ND + self.out(read_ND))
        result_ND: Tensor = self.last(h_ND + self.mlp(self.next_norm(h_ND)))
        return result_ND


class _Memory(nn.Module):
    def __init__(self, key: nn.Module, value: nn.Module, heads: int) -> None:
        super().__init__()
        self.key, self.value, self.heads = key, value, heads

    def forward(self, memory_BSD: Tensor) -> tuple[Tensor, Tensor]:
        shape, flat_ND = (*memory_BSD.shape[:2], self.heads, -1), memory_BSD.flatten(0, 1)
        return self.key(flat_ND).view(shape).transpose(1, 2), self.value(flat_ND).view(shape).transpose(1, 2)


class _BeforeOfGPT2(nn.Module):
    """GPT-2 keeps the three projections as one matrix."""

    def __init__(self, norm: nn.Module, attention: Any) -> None:
        super().__init__()
        self.norm, self.projections, self.scale = norm, attention.c_attn, attention.scaling

    def forward(self, h_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self.projections(self.norm(h_ND)).chunk(3, -1)
        return query * self.scale, key, value


class _MemoryOfGPT2(nn.Module):
    def __init__(self, cross: Any, heads: int) -> None:
        super().__init__()
        self.projections, self.heads = cross.c_attn, heads

    def forward(self, memory_BSD: Tensor) -> tuple[Tensor, Tensor]:
        shape, both = (*memory_BSD.shape[:2], self.heads, -1), self.projections(memory_BSD.flatten(0, 1)).chunk(2, -1)
        key, value = (x_ND.reshape(shape).transpose(1, 2) for x_ND in both)
        return key, value


class _QKV(nn.Module):
    """The norm and the three projections of a block; torch keeps their matrices as one."""

    def __init__(self, block: Any, heads: int) -> None:
        super().__init__()
        self.norm, self.weight, self.bias = block.ln_1, block.attn.in_proj_weight, block.attn.in_proj_bias
        self.scale = (self.weight.shape[1] // heads) ** -0.5

    def forward(self, h_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = linear(self.norm(h_ND), self.weight, self.bias).chunk(3, -1)
        return query * self.scale, key, value


class _Residual(nn.Module):
    """What a block does with what its attention read."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.out, self.attention_scale = block.attn.out_proj, block.ls_1
        self.norm, self.mlp, self.mlp_scale = block.ln_2, block.mlp, block.ls_2

    def forward(self, h_ND: Tensor, read_ND: Tensor) -> Tensor:
        h_ND = h_ND + self.attention_scale(self.out(read_ND))
        result_ND: Tensor = h_ND + self.mlp_scale(self.mlp(self.norm(h_ND)))
        return result_ND


class _ResidualAndQuery(nn.Module):
    def __init__(self, block: Any, cross: Any, heads: int) -> None:
        super().__init__()
        self.residual, self.norm = _Residual(block), cross.ln_1
        self.weight, self.bias = cross.attn.in_proj_weight, cross.attn.in_proj_bias
        self.scale = (self.weight.shape[1] // heads) ** -0.5

    def forward(self, h_ND: Tensor, read_ND: Tensor) -> tuple[Tensor, Tensor]:
        h_ND, width = self.residual(h_ND, read_ND), self.weight.shape[1]
        return h_ND, linear(self.norm(h_ND), self.weight[:width], self.bias[:width]) * self.scale


class _MemoryOfBlock(nn.Module):
    def __init__(self, cross: Any, heads: int) -> None:
        super().__init__()
        self.norm, self.heads = cross.ln_1_kv, heads
        self.weight, self.bias = cross.attn.in_proj_weight, cross.attn.in_proj_bias

    def forward(self, memory_BSD: Tensor) -> tuple[Tensor, Tensor]:
        shape, flat_ND = (*memory_BSD.shape[:2], self.heads, -1), memory_BSD.flatten(0, 1)
        width = self.weight.shape[1]
        both = linear(self.norm(flat_ND), self.weight[width:], self.bias[width:]).chunk(2, -1)
        key, value = (x_ND.reshape(shape).transpose(1, 2) for x_ND in both)
        return key, value


class _Turned(nn.Module):
    """Queries and keys are normed head by head and turned by their positions; queries in groups share a key."""

    def __init__(self, norm: nn.Module, own: Any, turns: Turns) -> None:
        super().__init__()
        self.norm, self.query, self.key, self.value = norm, own.q_proj, own.k_proj, own.v_proj
        self.query_norm, self.key_norm, self.d, self.groups = (
            own.q_norm,
            own.k_norm,
            own.head_dim,
            own.num_key_value_groups,
        )
        self.scale, self.turns = own.scaling, turns

    def forward(self, h_ND: Tensor, at_N1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_ND = self.norm(h_ND)
        query_NHd, key_NHd = (proj(x_ND).unflatten(-1, (-1, self.d)) for proj in (self.query, self.key))
        query_NHd, key_NHd = apply_rotary_pos_emb(
            self.query_norm(query_NHd), self.key_norm(key_NHd), *self.turns(at_N1, x_ND)
        )
        query_NHGd = query_NHd.unflatten(1, (-1, self.groups)) * self.scale
        return query_NHGd.transpose(1, 2).flatten(1), key_NHd.flatten(1), self.value(x_ND)


class _Regrouped(nn.Module):
    """What queries read, in the order of the heads again."""

    def __init__(self, own: Any) -> None:
        super().__init__()
        self.d, self.groups = own.head_dim, own.num_key_value_groups

    def forward(self, read_ND: Tensor) -> Tensor:
        return read_ND.unflatten(1, (self.groups, -1, self.d)).transpose(1, 2).flatten(1)


class _NormedMemory(nn.Module):
    """The memory's keys are normed and not turned."""

    def __init__(self, own: Any) -> None:
        super().__init__()
        self.key, self.value, self.key_norm, self.d = own.k_proj, own.v_proj, own.k_norm, own.head_dim

    def forward(self, memory_BSD: Tensor) -> tuple[Tensor, Tensor]:
        shape, flat_ND = (*memory_BSD.shape[:2], -1, self.d), memory_BSD.flatten(0, 1)
        key, value = (project(flat_ND).view(shape) for project in (self.key, self.value))
        return self.key_norm(key).transpose(1, 2), value.transpose(1, 2)
