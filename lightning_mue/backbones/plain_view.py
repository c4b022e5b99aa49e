"""PlainView: the base of a view of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_mue.backbones.generating import GeneratingView
from lightning_mue.backbones.stream import DecoderStream, EncoderStream, Outputs


class PlainView(GeneratingView):
    """A model whose last encoder stream is the decoder's memory, all of it read; owns no weights.

    Args:
        model: with a ``generation_config`` of transformers, and with a ``generate`` if it is to be compared.
        encoders: its streams before the decoder, in the order they run.
        decoder: its decoder.
        generate_inputs: names of the tensors that its ``generate`` reads.
    """

    contrastive = None

    def __init__(
        self, model: Any, encoders: Sequence[EncoderStream], decoder: DecoderStream, generate_inputs: Sequence[str]
    ) -> None:
        super().__init__(model)
        self.encoders: tuple[EncoderStream, ...] = tuple(encoders)
        self.decoder: DecoderStream = decoder
        self.generate_inputs = (*generate_inputs, "decoder_prompt")

    def memory(self, done: Outputs) -> Tensor:
        """What the last stream before the decoder gave."""
        return done[self.encoders[-1].name]
