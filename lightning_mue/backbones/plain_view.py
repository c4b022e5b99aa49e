"""PlainView: what views of models with a generation config have in common; the base of a view of one's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from lightning_mue.backbones.generation import build_processors, generate_as_asked, read_settings
from lightning_mue.backbones.stream import (
    DecoderStream,
    DecodeSettings,
    EncoderStream,
    Inputs,
    Outputs,
    TokenProcessor,
)


class PlainView:
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
        self.model: Any = model
        self.encoders: tuple[EncoderStream, ...] = tuple(encoders)
        self.decoder: DecoderStream = decoder
        self.generate_inputs = (*generate_inputs, "decoder_prompt")

    def generate(self, inputs: Inputs, **settings: Any) -> Tensor:
        """The model's own ``generate``."""
        given = {name: inputs[name] for name in self.generate_inputs if inputs.get(name) is not None}
        return generate_as_asked(self.model.generate, given, self.decode_settings, settings)

    def memory(self, done: Outputs) -> Tensor:
        """What the last stream before the decoder gave."""
        return done[self.encoders[-1].name]

    def memory_mask(self, inputs: Inputs) -> Tensor | None:
        """All of the memory is read."""
        return None

    def decode_settings(self, max_new_tokens: int | None) -> DecodeSettings:
        """Read ``model.generation_config``."""
        return read_settings(self.model.generation_config, max_new_tokens)

    def token_processors(
        self,
        settings: DecodeSettings,
        prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None,
        prompts: Sequence[Sequence[int]],
    ) -> list[TokenProcessor]:
        """Transformers' own logits processors."""
        return build_processors(settings, prefix_allowed_tokens_fn, prompts)
