"""Backbone: a model seen as streams."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from lightning_mue.backbones.stream import (
    DecoderStream,
    DecodeSettings,
    EncoderStream,
    Inputs,
    Outputs,
    TokenProcessor,
)

if TYPE_CHECKING:
    from lightning_mue.backbones.contrastive import Contrastive


class Backbone(Protocol):
    """A model seen as streams."""

    @property
    def model(self) -> nn.Module:
        """The model itself."""

    @property
    def encoders(self) -> Sequence[EncoderStream]:
        """The streams before the decoder, in the order they run."""

    @property
    def decoder(self) -> DecoderStream:
        """The decoder."""

    @property
    def contrastive(self) -> Contrastive | None:
        """What compares pictures with texts, or None."""

    @property
    def generate_inputs(self) -> tuple[str, ...]:
        """Names of the tensors that ``generate`` reads."""

    @property
    def generator(self) -> Any:
        """The part whose ``generate`` decodes: the model itself, or one that its own ``generate`` calls."""

    def answer_call(self, asked: Mapping[str, Any], memory_BSD: Tensor, valid_BS: Tensor | None) -> dict[str, Any]:
        """Return what the generator's ``generate`` is given to answer from a memory.

        Args:
            asked: arguments of a call of the model's own ``generate`` that no stream before the decoder reads.
            memory_BSD: what the decoder reads.
            valid_BS: 1 at its tokens that are read; all of them if None.
        """

    def generate(self, inputs: Inputs, **settings: Any) -> Tensor:
        """Return the ids of the model library's own ``generate``, as a baseline."""

    def read_call(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a call of the model's own ``forward`` under our names: ``labels`` are the answer's tokens alone."""

    def memory(self, done: Outputs) -> Tensor:
        """Return what the decoder reads, ``[B, S, D]``."""

    def memory_mask(self, inputs: Inputs) -> Tensor | None:
        """Return the additive mask ``[B, 1, 1, S]`` of the decoder's cross-attention, or None."""

    def decode_settings(self, max_new_tokens: int | None) -> DecodeSettings:
        """Read the generation config.

        Raises:
            ValueError: it asks for something the engine does not do.
        """

    def token_processors(
        self,
        settings: DecodeSettings,
        prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None,
        prompts: Sequence[Sequence[int]],
    ) -> list[TokenProcessor]:
        """Return what ``generate`` would apply to each step's logits; ``prompts`` is what each row was given."""


def num_layers(backbone: Backbone) -> dict[str, int]:
    """Return stream name -> layers at full depth, in the order the streams run."""
    return {s.name: s.num_layers for s in backbone.encoders} | {"decoder": backbone.decoder.num_layers}


def exit_streams(backbone: Backbone) -> dict[str, int]:
    """Return stream name -> layers of all streams that may have exits, one that only compares among them."""
    beside = {} if backbone.contrastive is None else {"text": backbone.contrastive.text.num_layers}
    return num_layers(backbone) | beside
