"""open_clip's CoCa as streams: ``vision`` and ``decoder``; and ``text``, alone, for what compares instead of captions.

The decoder's first layers are the unimodal half, which never reads the picture; exits lie in the multimodal half alone.
A layer of that half is two of open_clip's blocks: self-attention and MLP, cross-attention and MLP.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from open_clip.coca_model import CoCa
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from lightning_mue.backbones.coca_contrast import CoCaContrast
from lightning_mue.backbones.coca_model import CoCaForConditionalGeneration, check_towers
from lightning_mue.backbones.generating import GeneratingView
from lightning_mue.backbones.generation import read_settings
from lightning_mue.backbones.pieces import LayerPieces, coca_pieces
from lightning_mue.backbones.stream import (
    DecodeSettings,
    Inputs,
    LayerCall,
    LayerKV,
    Outputs,
    StreamState,
)


class ViTStream:
    """The blocks of a CoCa's image tower; final norm and poolers are the epilogue."""

    name = "vision"

    def __init__(self, coca: CoCa) -> None:
        self._visual: Any = coca.visual
        self._blocks = self._visual.transformer.resblocks
        self.num_layers, self.width = len(self._blocks), self._visual.transformer.width

    def prologue(self, inputs: Inputs, done: Outputs) -> StreamState:
        """Patches, class token and positions."""
        return StreamState(self._visual._embeds(inputs["pixel_values"].to(self._visual.conv1.weight.dtype)))

    def call(self, k: int, state: StreamState) -> LayerCall:
        """One block."""
        return LayerCall(_Block(self._blocks[k - 1]), (state.h_BTD,), ((0, 1),))

    def layer(self, k: int, state: StreamState) -> Tensor:
        """Run one block."""
        return self._blocks[k - 1](state.h_BTD)

    def epilogue(self, state: StreamState) -> Tensor:
        """Return the image tokens that the decoder reads, ``[B, S, embed_dim]``."""
        return self._visual._pool(state.h_BTD)[1]


class CoCaDecoderStream:
    """Both halves of a CoCa's text side as one decoder.

    Attributes:
        first_exit: the first layer that has read the picture.
    """

    def __init__(self, coca: CoCa) -> None:
        self._text: Any = coca.text
        self._decoder: Any = coca.text_decoder
        self.first_exit = len(self._text.transformer.resblocks) + 1
        self.num_layers = self.first_exit - 1 + len(self._decoder.resblocks)
        self.width = self.memory_width = self._text.width
        self.num_heads = self.num_kv_heads = self._text.heads
        self.head_dim = self.width // self.num_heads
        self.max_positions = min(self._text.context_length, self._decoder.context_length)
        self.vocab_size = self._decoder.text_projection.shape[1]

    def embed(self, ids_BT: Tensor, first: int) -> Tensor:
        """Token and position embeddings.

        Raises:
            ValueError: more positions than there are.
        """
        if first + ids_BT.shape[1] > self.max_positions:
            raise ValueError(f"CoCa's decoder has {self.max_positions} positions, got {first + ids_BT.shape[1]}")
        return self.embed_at(ids_BT, torch.arange(first, first + ids_BT.shape[1], device=ids_BT.device))

    def embed_at(self, ids_BT: Tensor, positions_T: Tensor) -> Tensor:
        """The same, of positions that are named."""
        return self._text.token_embedding(ids_BT) + self._text.positional_embedding[positions_T]

    def reads_memory(self, k: int) -> bool:
        """Whether layer ``k`` belongs to the multimodal half."""
        return k >= self.first_exit

    def window(self, k: int) -> None:
        """All positions before are seen."""

    def distance_bias(self) -> None:
        """Nothing: states know their positions."""

    def self_kv(self, k: int, h_BTD: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """K and V of layer ``k``'s self-attention, of its normed input."""
        _, key, value = self.pieces(k).before(h_BTD)
        return self._heads(key), self._heads(value)

    def memory_kv(self, k: int, memory_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of layer ``k``'s cross-attention."""
        memory = self.pieces(k).memory
        assert memory is not None
        key, value = memory(memory_BSD)
        return key, value

    def cached_layer(
        self, k: int, h_BTD: Tensor, kv: LayerKV, self_mask: Tensor | None, memory_mask: Tensor | None
    ) -> Tensor:
        """The layer's pieces around attention over ``kv``: torch's own attention takes no keys that are projected."""
        pieces = self.pieces(k)
        query, key, value = (self._heads(x) for x in pieces.before(h_BTD))
        read = scaled_dot_product_attention(query, *kv.update(key, value), self_mask, scale=1.0)
        if pieces.between is not None:
            h_BTD, query_BTD = pieces.between(h_BTD, self._flat(read))
            read = scaled_dot_product_attention(self._heads(query_BTD), *kv.memory(), memory_mask, scale=1.0)
        result_BTD: Tensor = pieces.after(h_BTD, self._flat(read))
        return result_BTD

    def layer(
        self, k: int, h_BTD: Tensor, memory_BSD: Tensor, self_mask: Tensor | None, memory_mask: Tensor | None
    ) -> Tensor:
        """open_clip's own blocks, without a cache."""
        mask_TT = None if self_mask is None else self_mask[0, 0]
        block, cross = self._blocks(k)
        h_BTD = block(h_BTD, attn_mask=mask_TT)
        return h_BTD if cross is None else cross(h_BTD, k_x=memory_BSD, v_x=memory_BSD)

    def pieces(self, k: int) -> LayerPieces:
        """Layer ``k`` cut at its attentions."""
        return coca_pieces(*self._blocks(k), self.num_heads)

    @property
    def norm_piece(self) -> nn.Module:
        """The final norm as a module."""
        return self._decoder.ln_final

    @property
    def head_piece(self) -> nn.Module:
        """The head as a module."""
        return _Head(self._decoder)

    def head_weights(self) -> tuple[np.ndarray, np.ndarray | None]:
        """The head's matrix, a view of the parameter where that is float32; there is no bias."""
        return self._decoder.text_projection.detach().float().numpy().T, None

    def norm(self, h_BTD: Tensor) -> Tensor:
        """The final norm."""
        return self._decoder.ln_final(h_BTD)

    def head(self, h_BTD: Tensor) -> Tensor:
        """Vocabulary logits."""
        return h_BTD @ self._decoder.text_projection

    def head_rows(self, ids_S: Tensor) -> Callable[[Tensor], Tensor]:
        """Columns of the projection."""
        weight_DS = self._decoder.text_projection[:, ids_S]
        return lambda h: h @ weight_DS

    def _blocks(self, k: int) -> tuple[Any, Any]:
        """Return the block with self-attention and the one with cross-attention, or None."""
        if k < self.first_exit:
            return self._text.transformer.resblocks[k - 1], None
        return self._decoder.resblocks[k - self.first_exit], self._decoder.cross_attn[k - self.first_exit]

    def _heads(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _flat(self, x_BHTd: Tensor) -> Tensor:
        return x_BHTd.transpose(1, 2).flatten(2)


class CoCaView(GeneratingView):
    """An open_clip ``CoCa``, or its `CoCaForConditionalGeneration`, seen as streams; owns no weights.

    Args:
        model: either.
    """

    def __init__(self, model: CoCa | CoCaForConditionalGeneration) -> None:
        super().__init__(model)
        self.coca: CoCa = model.coca if isinstance(model, CoCaForConditionalGeneration) else model
        check_towers(self.coca)
        self.encoders = (ViTStream(self.coca),)
        self.decoder = CoCaDecoderStream(self.coca)
        self.contrastive = CoCaContrast(self.coca, self.encoders[0])

    @cached_property
    def _shell(self) -> Any:
        if isinstance(self.model, CoCaForConditionalGeneration):
            return self.model
        return CoCaForConditionalGeneration.wrap(self.model)

    def memory(self, done: Outputs) -> Tensor:
        """The image tokens."""
        return done["vision"]

    def decode_settings(self, max_new_tokens: int | None) -> DecodeSettings:
        """Read the generation config: the shell's, which a CoCa alone gets as open_clip's tokenizer would have it."""
        return read_settings(self._shell.generation_config, max_new_tokens)

    def _generate(self, **inputs_and_settings: Any) -> Tensor:
        """Transformers' ``generate`` over CoCa's own forward, all of it anew at every step: upstream has no cache."""
        ids: Tensor = self._shell.generate(**inputs_and_settings)
        return ids


class _Block(nn.Module):
    """A block whose input has the name that all streams' states have in a graph."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, h_BTD: Tensor) -> Tensor:
        result_BTD: Tensor = self.block(h_BTD)
        return result_BTD


class _Head(nn.Module):
    def __init__(self, decoder: Any) -> None:
        super().__init__()
        self.text_projection = decoder.text_projection

    def forward(self, h_ND: Tensor) -> Tensor:
        return h_ND @ self.text_projection
