"""enable: a model's own ``generate`` obeys a policy, its encoders too; disable: it is as before."""

from __future__ import annotations

import copy
import inspect
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, StoppingCriteriaList, StopStringCriteria

from lightning_mue.backbones import unwrapped, view
from lightning_mue.inference.encode import encode
from lightning_mue.inference.request import longest_answer
from lightning_mue.inference.stopwatch import Stopwatch
from lightning_mue.policy import ExitPolicy
from lightning_mue.surface.early_exit import EarlyExit, one_at_a_time

_UNKNOWN = (
    "custom_generate",
    "assistant_model",
    "inputs_embeds",
    "decoder_inputs_embeds",
    "encoder_hidden_states",
    "decoder_prompt",
)
"""Arguments that would be passed over."""


class Enabled:
    """What `enable` returns: where the latest ``generate`` left.

    Attributes:
        exit_depths: stream -> exit depth of each sample ``[B]``; ``decoder`` -> of each row's tokens ``[R, T]``, 0
            after its last, and not there after beams.
    """

    def __init__(self) -> None:
        self.exit_depths: dict[str, Tensor] = {}


def enable(model: Any, policy: ExitPolicy, check_fingerprint: bool = True) -> Enabled:
    """Let ``model.generate`` obey a policy from now on, and so every pipeline around it; ``forward`` stays as it is.

    Greedy decoding, sampling, beams, ``num_return_sequences``, streamers, logits processors, stopping criteria and
    padding are transformers' own (but BLIP's own reads a question's padding). A certificate is of greedy decoding with
    the settings that it names. Calls from several threads wait for each other.

    Args:
        model: a supported model of transformers, with exits attached if the policy needs them; put into eval mode.
        policy: what may be left when. Without ``max_new_tokens`` or ``max_length`` answers are as long as certified.
        check_fingerprint: refuse a policy made for other weights.

    Raises:
        TypeError: the model has no view, or no ``generate`` that is transformers' own.
        ValueError: the policy does not fit, or asks for what only an ExitEngine does.
    """
    model = unwrapped(model)
    if not _is_transformers(model, view(model).generator):
        raise TypeError(f"{type(model).__name__} has no `generate` of transformers' own; use an ExitEngine.")
    found = Enabled()
    EarlyExit(policy, check_fingerprint=check_fingerprint).engine(model)  # what does not fit is refused now

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked = inspect.signature(type(self).generate).bind(self, *args, **kwargs).arguments
        for more in ("kwargs", "generate_kwargs"):
            asked |= asked.pop(more, {})
        with one_at_a_time(self):
            return _generate(asked, policy, found)

    model.generate = MethodType(generate, model)  # a copy of the model has one of its own
    return found


def _is_transformers(model: Any, generator: Any) -> bool:
    """Whether nobody else wrote the ``generate`` of a model, or of the part to which it hands over."""
    if getattr(type(generator), "generate", None) is not GenerationMixin.generate:
        return False
    return generator is model or type(model).generate.__module__.startswith("transformers.")


def disable(model: nn.Module) -> None:
    """Give the model its own ``generate`` back; nothing happens where `enable` was not called."""
    unwrapped(model).__dict__.pop("generate", None)


def _generate(asked: dict[str, Any], policy: ExitPolicy, found: Enabled) -> Any:
    """Run the encoders, and transformers' ``generate`` from there."""
    model: Any = asked.pop("self")
    leaves = EarlyExit(policy, asked.pop("streamer", None), check_fingerprint=False, whole=model)
    backbone = leaves.engine(model).backbone
    generator = backbone.generator
    _refuse(generator, asked)
    if (first := asked.pop("inputs", None)) is not None:
        asked[model.main_input_name] = first
    if all(asked.get(name) is None for name in ("max_new_tokens", "max_length", "generation_config")):
        certified = longest_answer(policy, None)
        asked |= {} if certified is None else {"max_new_tokens": certified}
    _stop_at_strings(generator, asked)
    depths: dict[str, Tensor] = {}
    if asked.get("encoder_outputs") is None:
        memory_BSD, valid_BS, depths = _encode(asked, leaves, model)
        asked = backbone.answer_call(asked, memory_BSD, valid_BS)
    result = GenerationMixin.generate(generator, custom_generate=leaves, **asked)
    found.exit_depths = depths | ({} if leaves.exit_depths is None else {"decoder": leaves.exit_depths})
    return result


def _refuse(model: Any, asked: dict[str, Any]) -> None:
    """Refuse what would silently be another thing.

    Raises:
        ValueError: what was asked.
    """
    refused = [name for name in _UNKNOWN if asked.pop(name, None) is not None]
    refused += ["interpolate_pos_encoding"] if asked.pop("interpolate_pos_encoding", False) else []
    # Their processors read the encoder's ids, which have been read by then.
    for name, harmless in (("encoder_repetition_penalty", (None, 1.0)), ("encoder_no_repeat_ngram_size", (None, 0))):
        refused += [name] if _setting(model, asked, name) not in harmless else []
    if refused:
        raise ValueError(f"With exits enabled `generate` takes no {refused}; `lightning_mue.disable(model)` first.")


def _setting(model: Any, asked: dict[str, Any], name: str) -> Any:
    """Return a setting of a call: as asked, or as the call's generation config or the model's says."""
    config = asked.get("generation_config") or model.generation_config
    return asked[name] if asked.get(name) is not None else getattr(config, name, None)


@torch.no_grad()
def _encode(
    asked: dict[str, Any], leaves: EarlyExit, model: nn.Module
) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """Take the encoders' inputs; return what the decoder reads, where it is no padding, and where they were left.

    Raises:
        ValueError: an input is missing.
    """
    engine = leaves.engine(model)
    backbone, silent = engine.backbone, Stopwatch(None, False)
    inputs = {name: asked.pop(name) for name in backbone.generate_inputs if asked.get(name) is not None}
    try:
        encoded = encode(backbone, engine.exits, inputs, leaves.policy.rules, silent)
    except KeyError as error:
        raise ValueError(f"With exits enabled `generate` needs {error}; it was given {sorted(inputs)}.") from error
    mask = backbone.memory_mask(inputs)
    return encoded.memory_BSD, None if mask is None else (mask[:, 0, 0] == 0).long(), encoded.depths


def _stop_at_strings(model: Any, asked: dict[str, Any]) -> None:
    """Make a criterion of ``stop_strings``: a ``custom_generate`` is not given the tokenizer."""
    tokenizer, strings = asked.pop("tokenizer", None), _setting(model, asked, "stop_strings")
    if strings is None or tokenizer is None:
        return
    asked.pop("stop_strings", None)
    config = copy.deepcopy(asked.get("generation_config") or model.generation_config)
    config.stop_strings = None
    criteria = [*(asked.get("stopping_criteria") or []), StopStringCriteria(tokenizer, strings)]
    asked |= {"generation_config": config, "stopping_criteria": StoppingCriteriaList(criteria)}
