"""enable: a model's own ``generate`` obeys a policy, its encoders too; disable: it is as before."""

from __future__ import annotations

import inspect
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, StoppingCriteriaList, StopStringCriteria

from lightning_mue.backbones import unwrapped
from lightning_mue.inference.encode import encode
from lightning_mue.inference.request import longest_answer
from lightning_mue.inference.stopwatch import Stopwatch
from lightning_mue.policy import ExitPolicy
from lightning_mue.surface.early_exit import EarlyExit, Memory


class Enabled:
    """What `enable` returns: where the latest ``generate`` left.

    Attributes:
        exit_depths: stream -> exit depth of each sample ``[B]``, of the decoder of each row's tokens ``[R, T]``.
    """

    def __init__(self) -> None:
        self.exit_depths: dict[str, Tensor] = {}


def enable(model: Any, policy: ExitPolicy, check_fingerprint: bool = True) -> Enabled:
    """Let ``model.generate`` obey a policy from now on, and so every pipeline around it; ``forward`` stays as it is.

    Greedy decoding, sampling, beams, ``num_return_sequences``, streamers, logits processors, stopping criteria and
    padding are transformers' own. A certificate is of greedy decoding with the settings that it names.

    Args:
        model: a supported model of transformers, with exits attached if the policy needs them; put into eval mode.
        policy: what may be left when. Without ``max_new_tokens`` or ``max_length`` answers are as long as certified.
        check_fingerprint: refuse a policy made for other weights.

    Raises:
        TypeError: the model has no ``generate``, or, as BLIP, not that of all models.
        ValueError: the policy does not fit, or asks for what only an ExitEngine does.
    """
    model = unwrapped(model)
    if getattr(type(model), "generate", None) is not GenerationMixin.generate:
        raise TypeError(
            f"{type(model).__name__} has no `generate` of transformers' own (BLIP writes another); use an ExitEngine."
        )
    found, leaves = Enabled(), EarlyExit(policy, check_fingerprint=check_fingerprint)
    leaves.engine(model)  # what does not fit is refused now
    own = type(model).generate

    @wraps(own)
    def generate(*args: Any, **kwargs: Any) -> Any:
        asked = inspect.signature(own).bind(model, *args, **kwargs).arguments
        asked |= asked.pop("kwargs", {})
        return _generate(asked, leaves, found)

    model.generate = generate
    return found


def disable(model: nn.Module) -> None:
    """Give the model its own ``generate`` back; nothing happens where `enable` was not called."""
    unwrapped(model).__dict__.pop("generate", None)


def _generate(asked: dict[str, Any], leaves: EarlyExit, found: Enabled) -> Any:
    """Run the encoders, and transformers' ``generate`` from there."""
    model: Any = asked.pop("self")
    if refused := [name for name in ("custom_generate", "assistant_model") if asked.pop(name, None) is not None]:
        raise ValueError(f"With exits enabled `generate` takes no {refused}; `lightning_mue.disable(model)` first.")
    leaves.streamer = asked.pop("streamer", None)
    if (first := asked.pop("inputs", None)) is not None:
        asked[model.main_input_name] = first
    if not {"max_new_tokens", "max_length", "generation_config"} & asked.keys():
        certified = longest_answer(leaves.policy, None)
        asked |= {} if certified is None else {"max_new_tokens": certified}
    _stop_at_strings(asked)
    depths: dict[str, Tensor] = {}
    if asked.get("encoder_outputs") is None:
        depths = _encode(asked, leaves, model)
    result = type(model).generate(model, custom_generate=leaves, **asked)
    found.exit_depths = depths | {"decoder": leaves.exit_depths}
    return result


@torch.no_grad()
def _encode(asked: dict[str, Any], leaves: EarlyExit, model: nn.Module) -> dict[str, Tensor]:
    """Replace the encoders' inputs by what they give; return where they were left."""
    engine = leaves.engine(model)
    backbone, silent = engine.backbone, Stopwatch(None, False)
    inputs = {name: asked.pop(name) for name in backbone.generate_inputs if asked.get(name) is not None}
    encoded = encode(backbone, engine.exits, inputs, leaves.policy.rules, silent)
    asked["encoder_outputs"] = Memory(last_hidden_state=encoded.memory_BSD)
    if (mask := backbone.memory_mask(inputs)) is not None:
        asked["attention_mask"] = (mask[:, 0, 0] == 0).long()
    return encoded.depths


def _stop_at_strings(asked: dict[str, Any]) -> None:
    """Make a criterion of ``stop_strings``: a ``custom_generate`` is not given the tokenizer."""
    tokenizer = asked.pop("tokenizer", None)
    if (strings := asked.get("stop_strings")) is not None and tokenizer is not None:
        del asked["stop_strings"]
        criteria = asked.get("stopping_criteria") or []
        asked["stopping_criteria"] = StoppingCriteriaList([*criteria, StopStringCriteria(tokenizer, strings)])
