"""``VisionEncoderDecoderModel`` of transformers 5 as streams: ``vision`` and ``decoder``; TrOCR, ViT-GPT2, Donut."""

from __future__ import annotations

from typing import Any

from torch import Tensor
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
from lightning_mue.backbones.stream import EncoderStream, Outputs
from lightning_mue.backbones.swin import SwinStream
from lightning_mue.backbones.vit import ViTStream


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


def _encoder_stream(encoder: Any) -> EncoderStream:
    if isinstance(encoder, (ViTModel, DeiTModel)):
        return ViTStream(encoder.embeddings, encoder.layers, encoder.layernorm)  # its pooler is not read
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
