"""T5 as streams: ``encoder`` and ``decoder``; the blocks of transformers themselves, fed with our K/V buffers.

Blocks are pre-norm, scores are not scaled, and what tells positions apart is a bias of self-attention's scores that
the first block's weights give and all blocks of a stack share (Raffel et al., JMLR 2020, section 2.1). UDOP's decoder
and blocks are the same.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mue.backbones.decoder import DecoderLayers, LayerCache
from lightning_mue.backbones.pieces import LayerPieces, t5_pieces
from lightning_mue.backbones.stream import Inputs, LayerCall, Outputs, StreamState, additive_mask


class T5EncoderStream:
    """The blocks of a T5's encoder; the bias is part of the mask, the final norm is the epilogue.

    Args:
        encoder: the backbone's encoder.
    """

    name = "encoder"

    def __init__(self, encoder: Any) -> None:
        self._encoder = encoder
        self.num_layers, self.width = len(encoder.block), encoder.config.d_model

    def prologue(self, inputs: Inputs, done: Outputs) -> StreamState:
        """Embeddings, and the mask: the bias, and the lowest number at padding."""
        h_BTD = self._encoder.embed_tokens(inputs["input_ids"])
        size = h_BTD.shape[1]
        bias = self._encoder.block[0].layer[0].SelfAttention.compute_bias(size, size)
        return self.masked(h_BTD, self.valid(inputs), bias)

    def masked(self, h_BTD: Tensor, valid_BT: Tensor | None, bias: Tensor) -> StreamState:
        """Return the state of embeddings, and of a bias ``[1 or B, heads, T, T]``."""
        hidden = additive_mask(valid_BT, bias.dtype)
        mask = bias if hidden is None else bias + hidden
        return StreamState(self._encoder.dropout(h_BTD), valid_BT, mask.expand(h_BTD.shape[0], -1, -1, -1))

    def valid(self, inputs: Inputs) -> Tensor | None:
        """Return True at the memory's real tokens, ``[B, S]``; None if all are."""
        valid = inputs.get("attention_mask")
        return None if valid is None else valid.bool()

    def call(self, k: int, state: StreamState) -> LayerCall:
        """One block."""
        assert state.mask is not None
        return LayerCall(_Block(self._encoder.block[k - 1]), (state.h_BTD, state.mask), ((0, 1), (0, 2, 3)))

    def layer(self, k: int, state: StreamState) -> Tensor:
        """Run one block."""
        return self.call(k, state)()

    def epilogue(self, state: StreamState) -> Tensor:
        """The final norm."""
        return self._encoder.dropout(self._encoder.final_layer_norm(state.h_BTD))


class T5DecoderStream(DecoderLayers):
    """The decoder of a T5 or a UDOP and the head above it.

    Args:
        decoder: the backbone's decoder.
        head: the vocabulary head.
        scale: of what the head reads; models whose head is their embedding have one.
    """

    max_positions = sys.maxsize
    """The bias tells far positions apart no more, so there may be any number."""

    def __init__(self, decoder: Any, head: nn.Linear, scale: float) -> None:
        super().__init__(_FinalNorm(decoder.final_layer_norm, decoder.dropout, scale), head)
        self._decoder, self._attention = decoder, decoder.block[0].layer[0].SelfAttention
        self.num_layers, self.width = len(decoder.block), decoder.config.d_model
        self.num_heads = self.num_kv_heads = decoder.config.num_heads
        self.head_dim = decoder.config.d_kv
        self.memory_width = self.width

    def embed_at(self, ids_BT: Tensor, positions_T: Tensor) -> Tensor:
        """Token embeddings, which know no positions."""
        return self._decoder.dropout(self._decoder.embed_tokens(ids_BT))

    def distance_bias(self) -> Tensor:
        """The first block's bias, as all blocks add it."""
        most = self._attention.relative_attention_max_distance
        bias = self._attention.compute_bias(1, most + 1, past_seen_tokens=most)
        return bias[0, :, 0].flip(-1)

    def self_kv(self, k: int, h_BTD: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """K and V of layer ``k``'s self-attention, of its normed input."""
        part = self._decoder.block[k - 1].layer[0]
        own, x_BTD = part.SelfAttention, part.layer_norm(h_BTD)
        return self._heads(own.k(x_BTD)), self._heads(own.v(x_BTD))

    def memory_kv(self, k: int, memory_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of layer ``k``'s cross-attention."""
        cross = self._decoder.block[k - 1].layer[1].EncDecAttention
        return self._heads(cross.k(memory_BSD)), self._heads(cross.v(memory_BSD))

    def pieces(self, k: int) -> LayerPieces:
        """Layer ``k`` cut at its attentions."""
        return t5_pieces(self._decoder.block[k - 1], self.num_heads)

    def _run(
        self,
        k: int,
        h_BTD: Tensor,
        memory_BSD: Tensor,
        self_mask: Tensor | None,
        memory_mask: Tensor | None,
        cache: LayerCache | None,
    ) -> Tensor:
        no_bias = h_BTD.new_zeros(())  # the mask holds it already
        given = (self_mask, no_bias, memory_BSD, memory_mask)
        result_BTD: Tensor = self._decoder.block[k - 1](h_BTD, *given, past_key_values=cache)[0]
        return result_BTD


def t5_decoder(model: Any, is_scaled: bool) -> T5DecoderStream:
    """Return the decoder stream of a model of that form; ``is_scaled``: its head is the embedding."""
    return T5DecoderStream(model.decoder, model.lm_head, model.config.d_model**-0.5 if is_scaled else 1.0)


class _Block(nn.Module):
    """An encoder's block; its mask holds the bias already."""

    unread = ("block.layer.0.SelfAttention.relative_attention_bias.weight",)
    """The first block's weights that the mask is made of."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, h_BTD: Tensor, mask: Tensor) -> Tensor:
        result_BTD: Tensor = self.block(h_BTD, mask, torch.zeros((), dtype=mask.dtype, device=mask.device))[0]
        return result_BTD


class _FinalNorm(nn.Module):
    """What lies between the last block and the head."""

    def __init__(self, norm: nn.Module, dropout: nn.Module, scale: float) -> None:
        super().__init__()
        self.norm, self.dropout, self.scale = norm, dropout, scale

    def forward(self, h_BTD: Tensor) -> Tensor:
        normed_BTD: Tensor = self.dropout(self.norm(h_BTD))
        return normed_BTD * self.scale
