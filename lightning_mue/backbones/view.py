"""From a model to its streams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import (
    Blip2ForConditionalGeneration,
    BlipForConditionalGeneration,
    BlipForQuestionAnswering,
    Florence2ForConditionalGeneration,
    PreTrainedModel,
    T5Gemma2ForConditionalGeneration,
    VisionEncoderDecoderModel,
)

from lightning_mue.backbones.backbone import Backbone
from lightning_mue.backbones.blip import BlipView
from lightning_mue.backbones.blip2 import Blip2View
from lightning_mue.backbones.florence2 import Florence2View
from lightning_mue.backbones.seq2seq import seq2seq_view
from lightning_mue.backbones.stream import EncoderKind
from lightning_mue.backbones.t5gemma2 import T5Gemma2View
from lightning_mue.backbones.vision_encoder_decoder import VisionEncoderDecoderView

EXITS = "mue_exits"
"""Name of the submodule that holds a model's exits, and so the prefix of every new ``state_dict`` key."""


_REGISTERED: dict[type[nn.Module], Callable[[Any], Backbone]] = {}


def register_view(kind: type[nn.Module], make: Callable[[Any], Backbone]) -> None:
    """Let models of a class of one's own be seen as streams, before those that are supported.

    Args:
        kind: the class.
        make: model -> its view, such as a subclass of ``PlainView``.
    """
    _REGISTERED[kind] = make


def unwrapped(model: Any) -> Any:
    """Return the model inside PEFT's wrapper, whose layers hold the adapters, or ``torch.compile``'s; or itself.

    Raises:
        ValueError: the wrapper learns prompts, which nobody would read.
    """
    if type(model).__name__ == "OptimizedModule":
        return unwrapped(model._orig_mod)
    if not any(kind.__name__ == "PeftModel" for kind in type(model).__mro__):
        return model
    if model.active_peft_config.is_prompt_learning:
        raise ValueError("PEFT's prompts are beside the model and not in its layers; LoRA and its like go on working.")
    return unwrapped(model.get_base_model())


def view(model: nn.Module, encoder: EncoderKind | None = None) -> Backbone:
    """Return the streams of a supported model; its weights and modules stay untouched.

    Args:
        model: a supported model, or PEFT's or ``torch.compile``'s wrapper around one.
        encoder: how image and text meet; if not given, as the attached exits say, else jointly.

    Raises:
        TypeError: the model's class, or that of one of its parts, has no view.
    """
    model = unwrapped(model)
    for kind in type(model).__mro__:
        if kind in _REGISTERED:
            return _REGISTERED[kind](model)
    if isinstance(model, Florence2ForConditionalGeneration):
        exits: Any = getattr(model, EXITS, None)
        return Florence2View(model, encoder or (exits.encoder if exits is not None else "joint"))
    if isinstance(model, VisionEncoderDecoderModel):
        return VisionEncoderDecoderView(model)
    if isinstance(model, (BlipForConditionalGeneration, BlipForQuestionAnswering)):
        return BlipView(model)
    if isinstance(model, Blip2ForConditionalGeneration):
        return Blip2View(model)
    if isinstance(model, T5Gemma2ForConditionalGeneration):
        return T5Gemma2View(model)
    if (found := seq2seq_view(model)) is not None:
        return found
    if type(model).__name__ in ("CoCa", "CoCaForConditionalGeneration"):
        from lightning_mue.backbones.coca import CoCaView  # open_clip takes seconds to import

        return CoCaView(model)
    raise TypeError(
        f"{type(model).__name__} has no view; supported: Florence2ForConditionalGeneration, VisionEncoderDecoderModel, "
        "BlipForConditionalGeneration, BlipForQuestionAnswering, Blip2ForConditionalGeneration around a T5, "
        "T5Gemma2ForConditionalGeneration, UdopForConditionalGeneration, T5ForConditionalGeneration, "
        "BartForConditionalGeneration, MBartForConditionalGeneration, open_clip's CoCa, and what `register_view` "
        f"names.{_why(model)}"
    )


def _why(model: nn.Module) -> str:
    """Return what keeps a model out, where it is known."""
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        return ""
    text: Any = getattr(model.config, "text_config", model.config)
    if not getattr(text, "is_encoder_decoder", True):
        return " Its decoder has no cross-attention: a token that leaves early needs a memory that stays as it is."
    return ""
