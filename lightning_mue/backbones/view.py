"""From a model to its streams."""

from __future__ import annotations

from torch import nn
from transformers import Florence2ForConditionalGeneration

from lightning_mue.backbones.florence2 import Florence2View
from lightning_mue.backbones.stream import Backbone


def view(model: nn.Module) -> Backbone:
    """Return the streams of a supported model; its weights and modules stay untouched.

    Raises:
        TypeError: the model's class has no view.
    """
    if isinstance(model, Florence2ForConditionalGeneration):
        return Florence2View(model)
    raise TypeError(f"{type(model).__name__} has no view; supported: Florence2ForConditionalGeneration.")
