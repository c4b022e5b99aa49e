"""T5Gemma 2 of transformers 5 as streams: ``vision``, ``encoder``, ``decoder``.

A decoder layer has one attention: a softmax over the keys of the tokens before and those of the memory (Zhang et al.,
2025, arXiv 2512.14856). Queries and the tokens' keys are turned by their positions, the memory's keys are not. Some
layers see a window of tokens alone; all of them see the whole memory.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import T5Gemma2ForConditionalGeneration
from transformers.models.t5gemma2.modeling_t5gemma2 import apply_rotary_pos_emb

from lightning_mue.backbones.decoder import DecoderLayers, LayerCache
from lightning_mue.backbones.pieces import LayerPieces, NoPieces, t5gemma2_pieces
from lightning_mue.backbones.plain_view import PlainView
from lightning_mue.backbones.stream import Inputs, LayerCall, Outputs, StreamState, additive_mask
from lightning_mue.backbones.turns import Turns, check_turns
from lightning_mue.backbones.vit import ViTStream

_SLIDING = "sliding_attention"


class PooledStream:
    """The layers of the SigLIP; the norm after them, the pooling and the projection always run.

    Args:
        encoder: the backbone's encoder.
    """

    name = "vision"

    def __init__(self, encoder: Any) -> None:
        self._project, tower = encoder.multi_modal_projector, encoder.vision_tower
        self._grid = (self._project.patches_per_image,) * 2
        self._blocks = ViTStream(tower.embeddings, tower.encoder.layers, tower.post_layernorm, masks=(None,))
        self.num_layers, self.width = self._blocks.num_layers, self._blocks.width
        self.call, self.layer = self._blocks.call, self._blocks.layer

    def prologue(self, inputs: Inputs, done: Outputs) -> StreamState:
        """Patches and positions; the pooling needs to know which grid they make up.

        Raises:
            ValueError: no picture.
        """
        if inputs.get("pixel_values") is None:
            raise ValueError("T5Gemma 2 is taken as a model that reads a picture: give `pixel_values`, [B, 3, H, W]")
        return replace(self._blocks.prologue(inputs, done), grid=self._grid)

    def epilogue(self, state: StreamState) -> Tensor:
        """What stands for the picture among the prompt's embeddings, ``[B, image tokens, D]``."""
        image_BND: Tensor = self._project(self._blocks.epilogue(state))
        return image_BND


class PromptStream:
    """The prompt, with the picture in it, through the encoder's layers.

    Args:
        encoder: the backbone's encoder.
    """

    name = "encoder"

    def __init__(self, encoder: Any) -> None:
        self._text, self._image_token = encoder.text_model, encoder.config.image_token_id
        self.num_layers, self.width = len(self._text.layers), self._text.config.hidden_size

    def prologue(self, inputs: Inputs, done: Outputs) -> StreamState:
        """Embeddings, the picture's at its tokens, and a mask for each kind of layer.

        Raises:
            ValueError: a row with another number of image tokens than a picture has.
        """
        ids_BT, image_BND, valid_BT = inputs["input_ids"], done["vision"], self.valid(inputs)
        h_BTD, is_image_BT = self._text.embed_tokens(ids_BT), ids_BT == self._image_token
        counts_B = is_image_BT.sum(1)
        if not torch.compiler.is_exporting() and bool((counts_B != image_BND.shape[1]).any()):
            raise ValueError(
                f"Every row of `input_ids` must hold the image token ({self._image_token}) as often as a picture has "
                f"tokens, {image_BND.shape[1]} times; got {counts_B.tolist()}"
            )
        h_BTD = h_BTD.masked_scatter(is_image_BT[..., None].expand_as(h_BTD), image_BND.to(h_BTD.dtype))
        return StreamState(self._text.dropout(h_BTD), valid_BT, self._mask(h_BTD, valid_BT))

    def valid(self, inputs: Inputs) -> Tensor | None:
        """Return True at the memory's real tokens, ``[B, T]``; None if all are."""
        valid = inputs.get("attention_mask")
        return None if valid is None else valid.bool()

    def call(self, k: int, state: StreamState) -> LayerCall:
        """One layer."""
        layer = self._text.layers[k - 1]
        module = _EncoderLayer(layer, Turns(self._text.rotary_emb, layer.attention_type))
        if state.mask is None:
            return LayerCall(module, (state.h_BTD,), ((0, 1),))
        return LayerCall(module, (state.h_BTD, state.mask), ((0, 1), (0, 2, 3)))

    def layer(self, k: int, state: StreamState) -> Tensor:
        """Run one layer."""
        return self.call(k, state)()

    def epilogue(self, state: StreamState) -> Tensor:
        """The final norm."""
        memory_BTD: Tensor = self._text.dropout(self._text.norm(state.h_BTD))
        return memory_BTD

    def _mask(self, h_BTD: Tensor, valid_BT: Tensor | None) -> Tensor | None:
        """Return ``[B, 2, T, T]``: of layers that see all, and of those that see a window; None if nothing is hidden.

        A window lies around each position, and an even one reaches one farther to the right.
        """
        (batch, size, _), sees = h_BTD.shape, self._text.config.sliding_window
        hidden = additive_mask(valid_BT, h_BTD.dtype)
        if hidden is None and not torch.compiler.is_exporting() and size <= (sees + 1) // 2:
            return None
        at_T = torch.arange(size, device=h_BTD.device)
        back_TT = at_T[:, None] - at_T
        outside_TT = (back_TT >= (sees + 1) // 2) | (-back_TT > sees // 2)
        lowest = torch.finfo(h_BTD.dtype).min
        window_TT = h_BTD.new_zeros(size, size).masked_fill(outside_TT, lowest)
        both_2TT = torch.stack([torch.zeros_like(window_TT), window_TT])
        mask = both_2TT[None] if hidden is None else (both_2TT[None] + hidden).clamp(min=lowest)
        return mask.expand(batch, -1, -1, -1)


class T5Gemma2DecoderStream(DecoderLayers):
    """The decoder and the head above it.

    Args:
        decoder: the backbone's decoder.
        head: the vocabulary head.
    """

    def __init__(self, decoder: Any, head: nn.Linear) -> None:
        super().__init__(nn.Sequential(decoder.norm, decoder.dropout), head)
        self._decoder, config = decoder, decoder.config
        self.num_layers, self.max_positions = len(decoder.layers), config.max_position_embeddings
        self.width = self.memory_width = config.hidden_size
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.num_kv_heads = config.num_key_value_heads
        self._cap = config.final_logit_softcapping

    def window(self, k: int) -> int | None:
        """That of a layer of the sliding kind."""
        sees: int | None = self._decoder.layers[k - 1].self_attn.sliding_window
        return sees

    def embed_at(self, ids_BT: Tensor, positions_T: Tensor) -> Tensor:
        """Token embeddings, which know no positions."""
        h_BTD: Tensor = self._decoder.dropout(self._decoder.embed_tokens(ids_BT))
        return h_BTD

    def self_kv(self, k: int, h_BTD: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """K, turned by its positions, and V of layer ``k``'s normed input."""
        layer = self._decoder.layers[k - 1]
        key, value = self._kv(k, layer.pre_self_attn_layernorm(h_BTD))
        return apply_rotary_pos_emb(key, key, *self._turns(k, h_BTD, first))[1], value

    def memory_kv(self, k: int, memory_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of the memory, by the matrices that project the tokens."""
        return self._kv(k, memory_BSD)

    def head(self, h_BTD: Tensor) -> Tensor:
        """Vocabulary logits, capped where the config asks for it."""
        return _capped(super().head(h_BTD), self._cap)

    def head_rows(self, ids_S: Tensor) -> Any:
        """Rows of the head's matrix, and the cap."""
        rows = super().head_rows(ids_S)
        return lambda h_BTD: _capped(rows(h_BTD), self._cap)

    def pieces(self, k: int) -> LayerPieces:
        """Layer ``k`` cut at its attention.

        Raises:
            NoPieces: logits are capped.
        """
        if self._cap is not None:
            raise NoPieces(
                f"`final_logit_softcapping` is {self._cap}, and runtime 'onnxruntime' reads the vocabulary head as a "
                "matrix alone; take runtime='torch'."
            )
        layer = self._decoder.layers[k - 1]
        return t5gemma2_pieces(layer, Turns(self._decoder.rotary_emb, layer.attention_type))

    def _run(
        self,
        k: int,
        h_BTD: Tensor,
        memory_BSD: Tensor,
        self_mask: Tensor | None,
        memory_mask: Tensor | None,
        cache: LayerCache | None,
    ) -> Tensor:
        first, read = (0, memory_BSD) if cache is None else (cache.first, cache.memory_key)
        mask = _merged(h_BTD, first, read.shape[-2], self_mask, memory_mask)
        result_BTD: Tensor = self._decoder.layers[k - 1](
            h_BTD,
            self._turns(k, h_BTD, first),
            mask,
            past_key_values=cache,
            use_cache=cache is not None,
            encoder_hidden_states=memory_BSD,
        )
        return result_BTD

    def _kv(self, k: int, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        own = self._decoder.layers[k - 1].self_attn
        key, value = (
            project(x_BTD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for project in (own.k_proj, own.v_proj)
        )
        return own.k_norm(key), value

    def _turns(self, k: int, h_BTD: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Return cosines and sines of positions from ``first`` on, each ``[1, T, d]``."""
        at_1T = torch.arange(first, first + h_BTD.shape[1], device=h_BTD.device)[None]
        cos_1Td, sin_1Td = self._decoder.rotary_emb(h_BTD, at_1T, self._decoder.layers[k - 1].attention_type)
        return cos_1Td, sin_1Td


class T5Gemma2View(PlainView):
    """A T5Gemma 2 seen as streams; owns no weights.

    Args:
        model: the model.

    Raises:
        ValueError: positions turn by angles that change with the length of the answer.
    """

    def __init__(self, model: T5Gemma2ForConditionalGeneration) -> None:
        parts: Any = model.model
        self._encoder = PromptStream(parts.encoder)
        check_turns(parts.encoder.text_model.rotary_emb)
        check_turns(parts.decoder.rotary_emb)
        decoder = T5Gemma2DecoderStream(parts.decoder, model.lm_head.out_proj)
        inputs = ("input_ids", "pixel_values", "attention_mask")
        super().__init__(model, [PooledStream(parts.encoder), self._encoder], decoder, inputs)

    def memory_mask(self, inputs: Inputs) -> Tensor | None:
        """The decoder must not read the prompt's padding."""
        return additive_mask(self._encoder.valid(inputs), self.model.dtype)


class _EncoderLayer(nn.Module):
    """A layer that takes the mask of its kind and counts its positions: transformers counts padding too."""

    def __init__(self, layer: Any, turns: Turns) -> None:
        super().__init__()
        self.layer, self.turns, self.of_kind = layer, turns, int(layer.attention_type == _SLIDING)

    def forward(self, h_BTD: Tensor, mask: Tensor | None = None) -> Tensor:
        at_1T1 = torch.arange(h_BTD.shape[1], device=h_BTD.device)[None, :, None]
        own_mask = None if mask is None else mask[:, self.of_kind : self.of_kind + 1]
        result_BTD: Tensor = self.layer(h_BTD, self.turns(at_1T1, h_BTD), own_mask)
        return result_BTD


def _merged(
    h_BTD: Tensor, first: int, memory_size: int, self_mask: Tensor | None, memory_mask: Tensor | None
) -> Tensor | None:
    """Return the mask over tokens, then memory: ``[B, 1, T, first + T + S]``; None if all is seen."""
    if self_mask is None and memory_mask is None:
        return None
    batch, size, _ = h_BTD.shape
    given = ((self_mask, first + size), (memory_mask, memory_size))
    parts = [h_BTD.new_zeros(()) if mask is None else mask for mask, _ in given]
    wide = [part.expand(batch, 1, size, n) for part, (_, n) in zip(parts, given, strict=True)]
    return torch.cat(wide, -1)


def _capped(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else (logits / cap).tanh() * cap
