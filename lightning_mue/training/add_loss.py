"""A training step whose loss has another added: how a project that computes its loss itself learns deep supervision."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_mue.training.replace_loss import replace_attribute


def add_loss(module: Any, model: Any, loss_of: Callable[[Mapping[str, Any]], Tensor]) -> Callable[[], None]:
    """Make ``module.training_step`` return its loss plus ``loss_of(call)`` for every call of ``model`` with gradients.

    The sum is what Lightning scales, logs and gives to ``backward``, so the added loss is treated as the project's own.

    Args:
        module: its ``training_step`` is replaced on the instance.
        model: what the step calls; its outputs stay as they are.
        loss_of: arguments of a call by name -> loss.

    Returns:
        What puts the module's own ``training_step`` back.
    """
    names, step = list(inspect.signature(model.forward).parameters), module.training_step
    calls: list[dict[str, Any]] = []

    def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            calls.append(dict(zip(names, args, strict=False)) | kwargs)

    @functools.wraps(step)
    def training_step(*args: Any, **kwargs: Any) -> Any:
        calls.clear()
        hook = model.register_forward_pre_hook(note, with_kwargs=True)
        try:
            result = step(*args, **kwargs)
        finally:
            hook.remove()
        return _plus(result, [loss_of(given) for given in calls]) if calls else result

    return replace_attribute(module, "training_step", training_step)


def _plus(result: Any, added: list[Tensor]) -> Any:
    """Return what a step returned, its loss with others added."""
    if isinstance(result, Tensor):
        return result + torch.stack(added).sum()
    if isinstance(result, Mapping) and isinstance(loss := result.get("loss"), Tensor):
        return {**result, "loss": loss + torch.stack(added).sum()}
    found = list(result) if isinstance(result, Mapping) else type(result).__name__
    raise ValueError(
        f"`training_step` must return its loss, or a mapping with `loss`, to which the exits' is added; got {found}. "
        "Under manual optimization compute the objective yourself (`lightning_mue.training.objective`)."
    )
