"""Florence-2 of transformers 5 as streams: ``vision`` (the long DaViT stage), ``encoder`` (joint BART), ``decoder``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import Florence2ForConditionalGeneration

from lightning_mue.backbones.bart import BartDecoderStream
from lightning_mue.backbones.generation import build_processors, read_settings
from lightning_mue.backbones.stream import DecodeSettings, Inputs, StreamState, TokenProcessor, additive_mask


class DaViTStream:
    """The longest DaViT stage; earlier stages are the prologue, later stages and the projector the epilogue.

    States are kept as ``[B, T, D]`` (``T`` = height * width) though DaViT's blocks take pictures: the two are views of
    each other. The feature map is square (so must the picture be), as Florence-2's processor makes it.
    """

    name = "vision"

    def __init__(self, model: Florence2ForConditionalGeneration) -> None:
        self._tower: Any = model.model.vision_tower
        self._projector = model.model.multi_modal_projector
        depths = [len(stage) for stage in self._tower.blocks]
        self._stage = depths.index(max(depths))
        self.num_layers = max(depths)
        self.width = self._tower.embed_dim[self._stage]

    def prologue(self, inputs: Inputs, before: Tensor | None) -> StreamState:
        """Run the stages before the long one and its patch embedding."""
        h_BCHW = inputs["pixel_values"]
        if h_BCHW.shape[-1] != h_BCHW.shape[-2]:
            raise ValueError(f"`pixel_values` must be square pictures, got {tuple(h_BCHW.shape)}")
        h_BCHW = h_BCHW.to(self._tower.convs[0].conv.weight.dtype)
        for conv, stage in zip(self._tower.convs[: self._stage], self._tower.blocks, strict=False):
            h_BCHW = conv(h_BCHW)
            for block in stage:
                h_BCHW = block(h_BCHW)
        return StreamState(self._tower.convs[self._stage](h_BCHW).flatten(2).transpose(1, 2))

    def layer(self, k: int, state: StreamState) -> Tensor:
        """Run one spatial + channel block."""
        return self._tower.blocks[self._stage][k - 1](_to_picture(state.h_BTD)).flatten(2).transpose(1, 2)

    def epilogue(self, h_BTD: Tensor) -> Tensor:
        """Run the later stages and the projector: image features ``[B, image tokens, text width]``."""
        h_BCHW = _to_picture(h_BTD)
        for i in range(self._stage + 1, self._tower.num_stages):
            h_BCHW = self._tower.convs[i](h_BCHW)
            for block in self._tower.blocks[i]:
                h_BCHW = block(h_BCHW)
        return self._projector(h_BCHW)


class JointEncoderStream:
    """The BART encoder over image and text tokens together, as pretrained."""

    name = "encoder"

    def __init__(self, model: Florence2ForConditionalGeneration) -> None:
        self._model: Any = model.model
        self._encoder: Any = model.model.language_model.encoder
        self.num_layers = len(self._encoder.layers)
        self.width = self._encoder.config.d_model

    def prologue(self, inputs: Inputs, before: Tensor | None) -> StreamState:
        """Splice the image features into the prompt's embeddings and add positions."""
        ids = inputs["input_ids"]
        h_BTD = self._model.get_input_embeddings()(ids)
        if before is not None:
            features = before.to(h_BTD.dtype)
            spots = self._model.get_placeholder_mask(ids, inputs_embeds=h_BTD, image_features=features)
            h_BTD = h_BTD.masked_scatter(spots, features)
        encoder = self._encoder
        h_BTD = encoder.layernorm_embedding(h_BTD + encoder.embed_positions(ids))
        h_BTD = nn.functional.dropout(h_BTD, p=encoder.dropout, training=encoder.training)
        valid = inputs.get("attention_mask")
        valid_BT = None if valid is None else valid.bool()
        return StreamState(h_BTD, valid_BT, additive_mask(valid_BT, h_BTD.dtype))

    def layer(self, k: int, state: StreamState) -> Tensor:
        """Run one encoder layer."""
        return self._encoder.layers[k - 1](state.h_BTD, state.mask)

    def epilogue(self, h_BTD: Tensor) -> Tensor:
        """BART is post-norm: the states are the memory."""
        return h_BTD


class Florence2View:
    """``Florence2ForConditionalGeneration`` seen as streams; owns no weights."""

    generate_inputs = ("input_ids", "pixel_values", "attention_mask")

    def __init__(self, model: Florence2ForConditionalGeneration) -> None:
        self.model = model
        self.encoders = (DaViTStream(model), JointEncoderStream(model))
        self.decoder = BartDecoderStream(model.model.language_model.decoder, model.lm_head)

    def memory_mask(self, inputs: Inputs) -> Tensor | None:
        """The decoder must not read the prompt's padding."""
        valid = inputs.get("attention_mask")
        return None if valid is None else additive_mask(valid.bool(), self.model.lm_head.weight.dtype)

    def decode_settings(self, max_new_tokens: int | None) -> DecodeSettings:
        """Read ``model.generation_config``."""
        return read_settings(self.model.generation_config, max_new_tokens)

    def token_processors(
        self, settings: DecodeSettings, prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None
    ) -> list[TokenProcessor]:
        """Transformers' own logits processors."""
        return build_processors(settings, prefix_allowed_tokens_fn)


def _to_picture(h_BTD: Tensor) -> Tensor:
    side = int(h_BTD.shape[1] ** 0.5)
    return h_BTD.transpose(1, 2).unflatten(2, (side, side))
