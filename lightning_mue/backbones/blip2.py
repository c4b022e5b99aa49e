"""BLIP-2 of transformers 5 around a T5 as streams: ``vision``, ``encoder``, ``decoder``.

The Q-Former reads the picture wherever its blocks were left; what its queries found stands at the prompt's placeholders
(Li et al., ICML 2023, section 3).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Blip2ForConditionalGeneration, T5ForConditionalGeneration

from lightning_mue.backbones.generation import read_settings
from lightning_mue.backbones.plain_view import PlainView
from lightning_mue.backbones.stream import DecodeSettings, Inputs, Outputs, StreamState, additive_mask
from lightning_mue.backbones.t5 import T5EncoderStream, t5_decoder
from lightning_mue.backbones.vit import ViTStream


class QueriedStream:
    """The blocks of the ViT; the norm after them, the Q-Former and the projection always run.

    Args:
        model: the model.
    """

    name = "vision"

    def __init__(self, model: Any) -> None:
        self._model, vision = model, model.vision_model
        self._blocks = ViTStream(vision.embeddings, vision.encoder.layers, vision.post_layernorm)
        self.num_layers, self.width = self._blocks.num_layers, self._blocks.width
        self.prologue, self.call, self.layer = self._blocks.prologue, self._blocks.call, self._blocks.layer

    def epilogue(self, state: StreamState) -> Tensor:
        """What the queries found, in the language model's width: ``[B, queries, D]``."""
        image_BSD, model = self._blocks.epilogue(state), self._model
        query_BQD = model.query_tokens.expand(image_BSD.shape[0], -1, -1)  # `len` would fix the batch of a graph
        found_BQD = model.qformer(query_BQD, encoder_hidden_states=image_BSD).last_hidden_state
        return model.language_projection(found_BQD.to(image_BSD.dtype))  # the Q-Former stays in float32


class PromptStream:
    """The prompt, with what the queries found in it, through the blocks of the T5's encoder.

    Args:
        model: the model.
    """

    name = "encoder"

    def __init__(self, model: Any) -> None:
        self._model, encoder = model, model.language_model.encoder
        self._encoder, self._blocks = encoder, T5EncoderStream(encoder)
        self.num_layers, self.width = self._blocks.num_layers, self._blocks.width
        self.call, self.layer, self.epilogue = self._blocks.call, self._blocks.layer, self._blocks.epilogue
        self.valid = self._blocks.valid

    def prologue(self, inputs: Inputs, done: Outputs) -> StreamState:
        """Embeddings, the queries' at the placeholders, and the mask, which holds the bias.

        Raises:
            ValueError: another number of placeholders than of queries.
        """
        found_BQD = done["vision"]
        ids_BS = self._ids(inputs, found_BQD)
        h_BSD = self._model.get_input_embeddings()(ids_BS)
        is_image_BS1 = self._model.get_placeholder_mask(ids_BS, h_BSD)
        if not torch.compiler.is_exporting() and bool((is_image_BS1.sum(1) != found_BQD.shape[1]).any()):
            raise ValueError(
                f"Every row of `input_ids` must hold the image token ({self._model.config.image_token_id}) as often as "
                f"there are queries, {found_BQD.shape[1]} times; got {is_image_BS1.sum(1).flatten().tolist()}"
            )
        h_BSD = h_BSD.masked_scatter(is_image_BS1.expand_as(h_BSD), found_BQD.to(h_BSD.dtype))
        bias = self._encoder.block[0].layer[0].SelfAttention.compute_bias(h_BSD.shape[1], h_BSD.shape[1])
        return self._blocks.masked(h_BSD, self.valid(inputs), bias)

    def _ids(self, inputs: Inputs, found_BQD: Tensor) -> Tensor:
        """Return the prompt's tokens; without one those that ``generate`` takes to caption: the picture and a start."""
        if (ids_BS := inputs.get("input_ids")) is not None:
            return ids_BS
        size, config = found_BQD.shape[:2], self._model.config
        image_BQ = torch.full(size, config.image_token_id, device=found_BQD.device)
        return nn.functional.pad(image_BQ, (0, 1), value=config.text_config.bos_token_id)


class Blip2View(PlainView):
    """A BLIP-2 whose language model is a T5 seen as streams; owns no weights.

    Args:
        model: the model.

    Raises:
        TypeError: its language model is no T5.
        ValueError: its config names no image token.
    """

    def __init__(self, model: Blip2ForConditionalGeneration) -> None:
        language: Any = model.language_model
        if not isinstance(language, T5ForConditionalGeneration):
            raise TypeError(
                f"A Blip2ForConditionalGeneration around {type(language).__name__} has no view, only one around "
                f"T5ForConditionalGeneration.{_why(language)}"
            )
        if model.config.image_token_id is None:
            raise ValueError("The config of a BLIP-2 must name `image_token_index`, where a prompt holds the picture.")
        self._encoder = PromptStream(model)
        decoder = t5_decoder(language, language.config.scale_decoder_outputs)
        inputs = ("input_ids", "pixel_values", "attention_mask")
        super().__init__(model, [QueriedStream(model), self._encoder], decoder, inputs)

    @property
    def generator(self) -> Any:
        """The language model."""
        return self.model.language_model

    def memory_mask(self, inputs: Inputs) -> Tensor | None:
        """The decoder must not read the prompt's padding."""
        return additive_mask(self._encoder.valid(inputs), self.model.language_model.dtype)

    def decode_settings(self, max_new_tokens: int | None) -> DecodeSettings:
        """Read the language model's generation config, as ``generate`` does."""
        return read_settings(self.model.language_model.generation_config, max_new_tokens)


def _why(language: Any) -> str:
    """Return what keeps a language model out, where it is known."""
    if language.config.is_encoder_decoder:
        return ""
    return (
        " A decoder alone has no cross-attention: it reads the picture as tokens before the answer, and a token that "
        "leaves early needs a memory that stays as it is."
    )
