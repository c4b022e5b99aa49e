"""A model whose ``loss`` is another for a while: how a training step that is not ours learns deep supervision."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


def replace_loss(model: Any, loss_of: Callable[[Mapping[str, Any]], Tensor]) -> Callable[[], None]:
    """Make ``model(**batch).loss`` be ``loss_of(batch)``; calls without gradients stay the model's own.

    The model's own forward does not run, so that nothing is computed twice.

    Args:
        model: its ``forward`` is replaced on the instance.
        loss_of: arguments of the call by name -> loss.

    Returns:
        What puts the model's own forward back.
    """
    plain = model.forward
    names = list(inspect.signature(plain).parameters)

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        given = dict(zip(names, args, strict=False)) | kwargs
        return TrainingOutput(loss_of(given), lambda: plain(*args, **kwargs))

    return replace_attribute(model, "forward", forward)


def replace_attribute(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Set an attribute on an instance; return what puts back what it had, its class's if nothing."""
    own, before = name in vars(owner), vars(owner).get(name)

    def restore() -> None:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)

    setattr(owner, name, value)
    return restore


class TrainingOutput:
    """An output whose ``loss`` was replaced; all else, such as ``logits``, the model computes when it is asked for.

    Args:
        loss: stands for the model's own.
        forward: the model's own call.
    """

    def __init__(self, loss: Tensor, forward: Callable[[], Any]) -> None:
        self.loss, self._forward = loss, forward

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # asked for by Python itself, as in a copy
            raise AttributeError(name)
        return getattr(self._own, name)

    def __getitem__(self, key: Any) -> Any:
        if key in ("loss", 0):
            return self.loss
        return self._own[key] if isinstance(key, str) else (self.loss, *self._own[1:])[key]

    @cached_property
    def _own(self) -> Any:
        return self._forward()
