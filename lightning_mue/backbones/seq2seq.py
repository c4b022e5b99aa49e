"""Models of transformers that read a sequence and write another, as streams ``encoder`` and ``decoder``.

T5, UDOP, BART and mBART.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import (
    BartForConditionalGeneration,
    MBartForConditionalGeneration,
    T5ForConditionalGeneration,
    UdopForConditionalGeneration,
)

from lightning_mue.backbones.bart import BartDecoderStream
from lightning_mue.backbones.joint import BartEncoderStream
from lightning_mue.backbones.plain_view import PlainView
from lightning_mue.backbones.stream import DecoderStream, EncoderStream, Inputs, additive_mask
from lightning_mue.backbones.t5 import T5EncoderStream, t5_decoder
from lightning_mue.backbones.udop import UdopEncoderStream

_TEXT = ("input_ids", "attention_mask")


class MemoryStream(EncoderStream, Protocol):
    """A stream whose result is the decoder's memory."""

    def valid(self, inputs: Inputs) -> Tensor | None:
        """Return True at the memory's real tokens, ``[B, S]``; None if all are."""


class Seq2SeqView(PlainView):
    """A model with one encoder and one decoder seen as streams; owns no weights.

    Args:
        model: the model.
        encoder: its stream.
        decoder: its stream.
        inputs: names of the tensors that the encoder reads.
    """

    def __init__(self, model: nn.Module, encoder: MemoryStream, decoder: DecoderStream, inputs: Sequence[str]) -> None:
        super().__init__(model, [encoder], decoder, inputs)
        self._encoder = encoder

    def memory_mask(self, inputs: Inputs) -> Tensor | None:
        """The decoder must not read padding."""
        return additive_mask(self._encoder.valid(inputs), next(self.model.parameters()).dtype)


def seq2seq_view(model: nn.Module) -> Seq2SeqView | None:
    """Return the streams of such a model; None of another.

    Raises:
        ValueError: a BART whose logits have a bias.
    """
    parts: Any = model
    encoder: MemoryStream
    if isinstance(model, T5ForConditionalGeneration):
        encoder, decoder = T5EncoderStream(parts.encoder), t5_decoder(parts, parts.config.scale_decoder_outputs)
        return Seq2SeqView(model, encoder, decoder, _TEXT)
    if isinstance(model, UdopForConditionalGeneration):
        encoder, decoder = UdopEncoderStream(parts.encoder), t5_decoder(parts, parts.config.tie_word_embeddings)
        return Seq2SeqView(model, encoder, decoder, (*_TEXT, "bbox", "pixel_values"))
    if isinstance(model, (BartForConditionalGeneration, MBartForConditionalGeneration)):
        if bool(parts.final_logits_bias.any()):
            kind = type(model).__name__
            raise ValueError(f"{kind} adds `final_logits_bias` to its logits, which exits do not; set it to zero.")
        encoder = BartEncoderStream(parts.model.encoder)
        return Seq2SeqView(model, encoder, BartDecoderStream(parts.model.decoder, parts.lm_head), _TEXT)
    return None
