"""A model whose ``loss`` is another for a while: how a training step that is not ours learns deep supervision."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

LossOf = Callable[[Mapping[str, Any], bool], Tensor]
"""Arguments of a call by name, and whether the model's own loss comes from elsewhere -> loss."""


def replace_loss(model: Any, loss_of: LossOf) -> Callable[[], None]:
    """Make ``model(**batch).loss`` be ``loss_of(batch, False)``; calls without gradients stay the model's own.

    The model's own forward does not run unless something else of its output is read, so that nothing is computed twice.
    What ``torch.compile`` made of the whole model is of another forward and stands aside; layers stay compiled. A step
    that is itself compiled goes on with what it has compiled: it would have to begin anew at each of our forwards.

    Args:
        model: its ``forward`` is replaced on the instance.
        loss_of: what the loss is.

    Returns:
        What puts the model's own forward back.
    """
    plain = model.forward
    names = list(inspect.signature(plain).parameters)

    @torch.compiler.disable
    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        given = dict(zip(names, args, strict=False)) | kwargs
        return TrainingOutput(given, loss_of, lambda: plain(*args, **kwargs))

    put_back = [replace_attribute(model, "forward", forward), replace_attribute(model, "_compiled_call_impl", None)]

    def restore() -> None:
        for one in put_back:
            one()

    return restore


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
    """An output whose ``loss`` is another; it and all else, such as ``logits``, are computed when they are read.

    Args:
        given: arguments of the call by name.
        loss_of: what the loss is.
        forward: the model's own call.
    """

    def __init__(self, given: Mapping[str, Any], loss_of: LossOf, forward: Callable[[], Any]) -> None:
        self._given, self._loss_of, self._forward = given, loss_of, forward

    @cached_property
    @torch.compiler.disable
    def loss(self) -> Tensor:
        """Stands for the model's own."""
        return self._loss_of(self._given, False)

    @torch.compiler.disable
    def exit_losses(self, labels_BT: Tensor) -> Tensor:
        """Return what to add to a loss that somebody else made of ``logits``."""
        return self._loss_of({**self._given, "labels": labels_BT}, True)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # asked for by Python itself, as in a copy
            raise AttributeError(name)
        return getattr(self._own, name)

    def __getitem__(self, key: Any) -> Any:
        if self._given.get("labels") is None:  # then the model's own output holds no loss either
            return self._own[key]
        if key in ("loss", 0):
            return self.loss
        return self._own[key] if isinstance(key, str) else (self.loss, *self._own[1:])[key]

    def __contains__(self, key: Any) -> bool:
        return key in self._own

    @cached_property
    def _own(self) -> Any:
        return self._forward()
