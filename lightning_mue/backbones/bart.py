"""The BART family's decoder as a decoder stream: the layers of transformers themselves, fed with our K/V buffers.

BART is post-norm, mBART pre-norm with a final norm; they are alike in all else that matters here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import EncoderDecoderCache

from lightning_mue.backbones.pieces import LayerPieces, bart_pieces
from lightning_mue.backbones.stream import LayerKV


def is_prenorm(stack: Any) -> bool:
    """Whether the layers of a BART or mBART encoder or decoder norm their input instead of their output."""
    return hasattr(stack, "layer_norm")


def final_norm(stack: Any) -> nn.Module:
    """Return what an encoder or decoder applies after its last layer."""
    return stack.layer_norm if is_prenorm(stack) else nn.Identity()


class _LayerCache(EncoderDecoderCache):
    """Hands one layer's K/V to the layer's attention, which asks an encoder-decoder cache for them.

    ``is_updated`` says that the memory is already projected, so that the layer reads ``memory_kv``'s result.
    """

    def __init__(self, k: int, kv: LayerKV) -> None:
        key, value = kv.memory()
        index = k - 1
        self.is_updated = {index: True}
        self.self_attention_cache: Any = SimpleNamespace(update=lambda key, value, _layer: kv.update(key, value))
        self.cross_attention_cache: Any = SimpleNamespace(layers={index: SimpleNamespace(keys=key, values=value)})


class BartDecoderStream:
    """A ``BartDecoder`` or ``MBartDecoder`` and the head above it.

    Args:
        decoder: the backbone's decoder.
        head: the vocabulary head.
    """

    def __init__(self, decoder: Any, head: nn.Linear) -> None:
        self._decoder = decoder
        self._head = head
        self._norm, self._prenorm = final_norm(decoder), is_prenorm(decoder)
        config = self._decoder.config
        self.num_layers = len(self._decoder.layers)
        self.width = config.d_model
        self.num_heads = config.decoder_attention_heads
        self.head_dim = config.d_model // config.decoder_attention_heads
        self.max_positions = config.max_position_embeddings
        self.vocab_size = head.out_features

    first_exit = 1

    def reads_memory(self, k: int) -> bool:
        """All layers do."""
        return True

    def embed(self, ids_BT: Tensor, first: int) -> Tensor:
        """Token and position embeddings, as ``BartDecoder.forward`` adds them."""
        return self.embed_at(ids_BT, torch.arange(first, first + ids_BT.shape[1], device=ids_BT.device))

    def embed_at(self, ids_BT: Tensor, positions_T: Tensor) -> Tensor:
        """The same, of positions that are named."""
        decoder = self._decoder
        h_BTD = decoder.embed_tokens(ids_BT) + decoder.embed_positions(ids_BT, position_ids=positions_T)
        h_BTD = decoder.layernorm_embedding(h_BTD)
        return nn.functional.dropout(h_BTD, p=decoder.dropout, training=decoder.training)

    def self_kv(self, k: int, h_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of layer ``k``'s self-attention, of its normed input where the layer is pre-norm."""
        layer = self._decoder.layers[k - 1]
        return self._project(layer.self_attn, layer.self_attn_layer_norm(h_BTD) if self._prenorm else h_BTD)

    def memory_kv(self, k: int, memory_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of layer ``k``'s cross-attention."""
        return self._project(self._decoder.layers[k - 1].encoder_attn, memory_BSD)

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

    def pieces(self, k: int) -> LayerPieces:
        """Layer ``k`` cut at its attentions."""
        return bart_pieces(self._decoder.layers[k - 1], self.num_heads, self._prenorm)

    @property
    def norm_piece(self) -> nn.Module:
        """The final norm as a module."""
        return self._norm

    @property
    def head_piece(self) -> nn.Module:
        """The head as a module."""
        return self._head

    def head_weights(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Matrix and bias of the head, as float32 arrays that share the parameters' memory where they can."""
        weight, bias = (None if p is None else p.detach().float() for p in (self._head.weight, self._head.bias))
        assert weight is not None
        return weight.numpy(), None if bias is None else bias.numpy()

    def norm(self, h_BTD: Tensor) -> Tensor:
        """The final norm; nothing is left to apply where layers are post-norm."""
        return self._norm(h_BTD)

    def head(self, h_BTD: Tensor) -> Tensor:
        """Vocabulary logits."""
        return self._head(h_BTD)

    def head_rows(self, ids_S: Tensor) -> Callable[[Tensor], Tensor]:
        """Rows of the head's matrix."""
        bias = None if self._head.bias is None else self._head.bias[ids_S]
        return partial(nn.functional.linear, weight=self._head.weight[ids_S], bias=bias)

    def _project(self, attention: Any, h_BTD: Tensor) -> tuple[Tensor, Tensor]:
        shape = (*h_BTD.shape[:2], self.num_heads, self.head_dim)
        key, value = (proj(h_BTD).view(shape).transpose(1, 2) for proj in (attention.k_proj, attention.v_proj))
        return key, value
