"""``VisionEncoderDecoderModel`` of transformers 5 as streams: ``vision`` and ``decoder``; TrOCR, ViT-GPT2, Donut."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import (
    BartForCausalLM,
    DeiTModel,
    DonutSwinModel,
    GPT2LMHeadModel,
    MBartForCausalLM,
    SwinModel,
    TrOCRForCausalLM,
    ViTModel,
)

from lightning_mue.backbones.bart import BartDecoderStream
from lightning_mue.backbones.gpt2 import GPT2DecoderStream
from lightning_mue.backbones.plain_view import PlainView
from lightning_mue.backbones.stream import EncoderStream, Inputs, LayerCall, Outputs, StreamState
from lightning_mue.backbones.swin import SwinStream


class ViTStream:
    """The layers of a ``ViTModel`` or ``DeiTModel``; its final norm is the epilogue, its pooler is not read."""

    name = "vision"

    def __init__(self, encoder: Any) -> None:
        self._encoder = encoder
        self.num_layers, self.width = len(encoder.layers), encoder.config.hidden_size

    def prologue(self, inputs: Inputs, done: Outputs) -> StreamState:
        """Patches, class tokens and positions."""
        embeddings = self._encoder.embeddings
        return StreamState(embeddings(inputs["pixel_values"].to(embeddings.patch_embeddings.projection.weight.dtype)))

    def call(self, k: int, state: StreamState) -> LayerCall:
        """One layer."""
        return LayerCall(_Layer(self._encoder.layers[k - 1]), (state.h_BTD,), ((0, 1),))

    def layer(self, k: int, state: StreamState) -> Tensor:
        """Run one layer."""
        return self._encoder.layers[k - 1](state.h_BTD)

    def epilogue(self, state: StreamState) -> Tensor:
        """The final norm: all tokens, those of the classes too, are the decoder's to read."""
        return self._encoder.layernorm(state.h_BTD)


class VisionEncoderDecoderView(PlainView):
    """A ``VisionEncoderDecoderModel`` seen as streams; owns no weights.

    Args:
        model: the model.

    Raises:
        TypeError: its encoder or its decoder has no view.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model, [_encoder_stream(model.encoder)], _decoder_stream(model.decoder), ["pixel_values"])

    def memory(self, done: Outputs) -> Tensor:
        """The picture's tokens, in the decoder's width where the model brings them there."""
        projection = getattr(self.model, "enc_to_dec_proj", None)
        return done["vision"] if projection is None else projection(done["vision"])


def _encoder_stream(encoder: nn.Module) -> EncoderStream:
    if isinstance(encoder, (ViTModel, DeiTModel)):
        return ViTStream(encoder)
    if isinstance(encoder, (SwinModel, DonutSwinModel)):
        return SwinStream(encoder)
    raise TypeError(
        f"A VisionEncoderDecoderModel with {type(encoder).__name__} as its encoder has no view; supported: ViTModel, "
        "DeiTModel, SwinModel, DonutSwinModel."
    )


def _decoder_stream(decoder: Any) -> BartDecoderStream | GPT2DecoderStream:
    if isinstance(decoder, GPT2LMHeadModel):
        return GPT2DecoderStream(decoder)
    if isinstance(decoder, (BartForCausalLM, MBartForCausalLM, TrOCRForCausalLM)):
        return BartDecoderStream(decoder.model.decoder, decoder.get_output_embeddings())
    raise TypeError(
        f"A VisionEncoderDecoderModel with {type(decoder).__name__} as its decoder has no view; supported: "
        "TrOCRForCausalLM, BartForCausalLM, MBartForCausalLM, GPT2LMHeadModel."
    )


class _Layer(nn.Module):
    """A layer whose input has the name that all streams' states have in a graph."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, h_BTD: Tensor) -> Tensor:
        result_BTD: Tensor = self.layer(h_BTD)
        return result_BTD
