"""What views have in common of models that transformers' ``generate`` decodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from lightning_mue.backbones.generation import build_processors, generate_as_asked, read_settings
from lightning_mue.backbones.stream import DecodeSettings, Inputs, TokenProcessor


class Memory(BaseModelOutput):
    """Encoder outputs that are already what the decoder reads."""


class GeneratingView:
    """A model with a ``generate`` of transformers and the generation config that this obeys.

    Args:
        model: the model.
    """

    generate_inputs: tuple[str, ...] = ("pixel_values", "decoder_prompt")

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    def generator(self) -> Any:
        """The model, whose ``generate`` is that of all of transformers' models."""
        return self.model

    def answer_call(self, asked: Mapping[str, Any], memory_BSD: Tensor, valid_BS: Tensor | None) -> dict[str, Any]:
        """An encoder-decoder's: its encoder has run."""
        masks = {} if valid_BS is None else {"attention_mask": valid_BS}
        return {**asked, **masks, "encoder_outputs": Memory(last_hidden_state=memory_BSD)}

    def generate(self, inputs: Inputs, **settings: Any) -> Tensor:
        """Transformers' own ``generate``."""
        given = {name: inputs[name] for name in self.generate_inputs if inputs.get(name) is not None}
        return generate_as_asked(self._generate, given, self.decode_settings, settings)

    def memory_mask(self, inputs: Inputs) -> Tensor | None:
        """All tokens of a picture are read."""
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

    def read_call(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """The model's names are ours, and its labels are the answer's tokens."""
        return given

    def _generate(self, **inputs_and_settings: Any) -> Tensor:
        ids: Tensor = type(self.model).generate(self.model, **inputs_and_settings)  # whatever is enabled
        return ids
