"""The BART decoder of transformers as a decoder stream: the layers themselves, fed with our K/V buffers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EncoderDecoderCache

from lightning_mue.backbones.stream import LayerKV


class _LayerCache(EncoderDecoderCache):
    """Hands one layer's K/V to ``BartAttention``, which asks an encoder-decoder cache for them.

    ``is_updated`` says that the memory is already projected, so that the layer reads ``memory_kv``'s result.
    """

    def __init__(self, k: int, kv: LayerKV) -> None:
        key, value = kv.memory()
        index = k - 1
        self.is_updated = {index: True}
        self.self_attention_cache: Any = SimpleNamespace(update=lambda key, value, _layer: kv.update(key, value))
        self.cross_attention_cache: Any = SimpleNamespace(layers={index: SimpleNamespace(keys=key, values=value)})


class BartDecoderStream:
    """A ``BartDecoder`` and the head above it.

    Args:
        decoder: the backbone's ``BartDecoder``.
        head: the vocabulary head.
    """

    def __init__(self, decoder: Any, head: nn.Module) -> None:
        self._decoder = decoder
        self._head = head
        config = self._decoder.config
        self.num_layers = len(self._decoder.layers)
        self.width = config.d_model
        self.num_heads = config.decoder_attention_heads
        self.head_dim = config.d_model // config.decoder_attention_heads
        self.max_positions = config.max_position_embeddings

    def embed(self, ids_BT: Tensor, first: int) -> Tensor:
        """Token and position embeddings, as ``BartDecoder.forward`` adds them."""
        decoder = self._decoder
        positions = torch.arange(first, first + ids_BT.shape[1], device=ids_BT.device)
        h_BTD = decoder.embed_tokens(ids_BT) + decoder.embed_positions(ids_BT, first, position_ids=positions)
        h_BTD = decoder.layernorm_embedding(h_BTD)
        return nn.functional.dropout(h_BTD, p=decoder.dropout, training=decoder.training)

    def memory_kv(self, k: int, memory_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of layer ``k``'s cross-attention."""
        attention = self._decoder.layers[k - 1].encoder_attn
        shape = (*memory_BSD.shape[:2], self.num_heads, self.head_dim)
        key, value = (proj(memory_BSD).view(shape).transpose(1, 2) for proj in (attention.k_proj, attention.v_proj))
        return key, value

    def cached_layer(
        self, k: int, h_BTD: Tensor, kv: LayerKV, self_mask: Tensor | None, memory_mask: Tensor | None
    ) -> Tensor:
        """The layer itself; its K/V come from and go to ``kv``."""
        # encoder_hidden_states only tells the layer that there is a memory: its K/V are in the cache.
        return self._decoder.layers[k - 1](
            h_BTD,
            self_mask,
            encoder_hidden_states=h_BTD,
            encoder_attention_mask=memory_mask,
            past_key_values=_LayerCache(k, kv),
        )

    def layer(
        self, k: int, h_BTD: Tensor, memory_BSD: Tensor, self_mask: Tensor | None, memory_mask: Tensor | None
    ) -> Tensor:
        """The layer itself, without a cache."""
        return self._decoder.layers[k - 1](
            h_BTD, self_mask, memory_BSD, encoder_attention_mask=memory_mask, past_key_values=None, use_cache=False
        )

    def norm(self, h_BTD: Tensor) -> Tensor:
        """BART is post-norm: nothing is left to apply."""
        return h_BTD

    def head(self, h_BTD: Tensor) -> Tensor:
        """Vocabulary logits."""
        return self._head(h_BTD)
