"""What decoders of transformers have in common: layers that ask a cache for their K/V, a final norm, a linear head."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import EncoderDecoderCache

from lightning_mue.backbones.stream import LayerKV


class LayerCache(EncoderDecoderCache):
    """Hands one layer's K/V to the layer's attentions, which ask an encoder-decoder cache for them.

    ``is_updated`` says that the memory is already projected, so that the layer reads ``memory_kv``'s result.

    Args:
        k: the layer, counted from 1.
        kv: its K/V.

    Attributes:
        first: of the new positions.
        memory_key: the memory's, ``[R, kv heads, S, d]``.
    """

    def __init__(self, k: int, kv: LayerKV) -> None:
        key, value = kv.memory()
        index, self.first, self.memory_key = k - 1, kv.first, key
        self.is_updated = {index: True}
        # T5 asks for a length to make its bias of, which it is given.
        self.self_attention_cache: Any = SimpleNamespace(
            update=lambda key, value, _layer: kv.update(key, value), get_seq_length=lambda _layer: 0
        )
        self.cross_attention_cache: Any = SimpleNamespace(layers={index: SimpleNamespace(keys=key, values=value)})


class DecoderLayers(ABC):
    """A decoder stream whose layers all read the memory; a norm and a linear head follow the last one.

    Args:
        norm: the final norm; an identity where there is none.
        head: the vocabulary head.
    """

    first_exit = 1
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def __init__(self, norm: nn.Module, head: nn.Linear) -> None:
        self._norm, self._head = norm, head
        self.vocab_size = head.out_features

    @abstractmethod
    def embed_at(self, ids_BT: Tensor, positions_T: Tensor) -> Tensor:
        """Return the states that enter layer 1, of positions that are named."""

    def embed(self, ids_BT: Tensor, first: int) -> Tensor:
        """Return the same for positions ``first, first + 1, ...``."""
        return self.embed_at(ids_BT, torch.arange(first, first + ids_BT.shape[1], device=ids_BT.device))

    def cached_layer(
        self, k: int, h_BTD: Tensor, kv: LayerKV, self_mask: Tensor | None, memory_mask: Tensor | None
    ) -> Tensor:
        """The layer itself; its K/V come from and go to ``kv``."""
        # The states stand for the memory, whose K/V are in the cache: they only tell the layer that there is one.
        return self._run(k, h_BTD, h_BTD, self_mask, memory_mask, LayerCache(k, kv))

    def layer(
        self, k: int, h_BTD: Tensor, memory_BSD: Tensor, self_mask: Tensor | None, memory_mask: Tensor | None
    ) -> Tensor:
        """The layer itself, without a cache."""
        return self._run(k, h_BTD, memory_BSD, self_mask, memory_mask, None)

    @abstractmethod
    def _run(
        self,
        k: int,
        h_BTD: Tensor,
        memory_BSD: Tensor,
        self_mask: Tensor | None,
        memory_mask: Tensor | None,
        cache: LayerCache | None,
    ) -> Tensor:
        """Run the module that layer ``k`` is."""

    def _heads(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def reads_memory(self, k: int) -> bool:
        """All layers do."""
        return True

    def window(self, k: int) -> int | None:
        """All positions before are seen."""
        return None

    def distance_bias(self) -> Tensor | None:
        """Nothing: states know their positions."""
        return None

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
