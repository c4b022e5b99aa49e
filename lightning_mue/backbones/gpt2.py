"""GPT-2 with cross-attention as a decoder stream: the blocks of transformers themselves, fed with our K/V buffers."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import GPT2LMHeadModel

from lightning_mue.backbones.decoder import DecoderLayers, LayerCache
from lightning_mue.backbones.pieces import LayerPieces, gpt2_pieces


class GPT2DecoderStream(DecoderLayers):
    """A ``GPT2LMHeadModel`` that reads a picture.

    Args:
        decoder: the model.

    Raises:
        TypeError: its blocks have no cross-attention.
    """

    def __init__(self, decoder: GPT2LMHeadModel) -> None:
        self._decoder: Any = decoder.transformer
        super().__init__(self._decoder.ln_f, decoder.lm_head)
        first: Any = self._decoder.h[0]
        if not hasattr(first, "crossattention"):
            raise TypeError("A GPT-2 without cross-attention reads no picture; its config needs `add_cross_attention`.")
        self.num_layers = len(self._decoder.h)
        self.width = self.memory_width = self._decoder.embed_dim
        self.num_heads = self.num_kv_heads = first.attn.num_heads
        self.head_dim = first.attn.head_dim
        self.max_positions = self._decoder.wpe.num_embeddings

    def embed_at(self, ids_BT: Tensor, positions_T: Tensor) -> Tensor:
        """Token and position embeddings, as ``GPT2Model.forward`` adds them."""
        return self._decoder.drop(self._decoder.wte(ids_BT) + self._decoder.wpe(positions_T))

    def self_kv(self, k: int, h_BTD: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """K and V of layer ``k``'s self-attention, of its normed input."""
        block = self._decoder.h[k - 1]
        _, key, value = block.attn.c_attn(block.ln_1(h_BTD)).chunk(3, -1)
        return self._heads(key), self._heads(value)

    def memory_kv(self, k: int, memory_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of layer ``k``'s cross-attention."""
        key, value = self._decoder.h[k - 1].crossattention.c_attn(memory_BSD).chunk(2, -1)
        return self._heads(key), self._heads(value)

    def pieces(self, k: int) -> LayerPieces:
        """Layer ``k`` cut at its attentions."""
        return gpt2_pieces(self._decoder.h[k - 1], self.num_heads)

    def _run(
        self,
        k: int,
        h_BTD: Tensor,
        memory_BSD: Tensor,
        self_mask: Tensor | None,
        memory_mask: Tensor | None,
        cache: LayerCache | None,
    ) -> Tensor:
        beside = (cache, self_mask, memory_BSD, memory_mask)
        return self._decoder.h[k - 1](h_BTD, *beside, use_cache=cache is not None)
