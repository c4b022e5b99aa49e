"""A training step whose loss has another added: how a project that computes its loss itself learns deep supervision."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_mue.training.replace_loss import replace_attribute

Loss = Callable[[Mapping[str, Any]], Tensor]
"""Arguments of a call by name -> loss."""


def add_loss(module: Any, model: Any, loss_of: Loss) -> Callable[[], None]:
    """Make ``module.training_step`` return its loss plus ``loss_of(call)`` for every call of ``model`` with gradients.

    The sum is what Lightning scales, logs and gives to ``backward``, so the added loss is treated as the project's own.
    Of several models in one module all are added by one step, so they may be taken back in any order.

    Args:
        module: its ``training_step`` is replaced on the instance.
        model: what the step calls; its outputs stay as they are.
        loss_of: arguments of a call by name -> loss.

    Returns:
        What takes the loss back; with the last one the module has its own ``training_step`` again.
    """
    step = vars(module).get("training_step")
    if not hasattr(step, "added"):
        step = _adding(module)
        step.put_back = replace_attribute(module, "training_step", step)
    entry = (model, loss_of)
    step.added.append(entry)

    def restore() -> None:
        step.added.remove(entry)
        if not step.added:
            step.put_back()

    return restore


def _adding(module: Any) -> Any:
    """Return the module's step with a list, ``added``, of models and the losses of their calls."""
    step, added = module.training_step, list[tuple[Any, Loss]]()

    @functools.wraps(step)
    def training_step(*args: Any, **kwargs: Any) -> Any:
        calls: list[tuple[Loss, dict[str, Any]]] = []
        with contextlib.ExitStack() as hooks:
            for model, loss_of in added:
                hook = model.register_forward_pre_hook(_noting(model, loss_of, calls), with_kwargs=True)
                hooks.callback(hook.remove)
            result = step(*args, **kwargs)
        if not calls or (result is None and module.automatic_optimization):  # None: the batch is passed over
            return result
        return _plus(result, [loss_of(given) for loss_of, given in calls])

    training_step.added = added  # type: ignore[attr-defined]
    return training_step


def _noting(model: Any, loss_of: Loss, calls: list[tuple[Loss, dict[str, Any]]]) -> Callable[..., None]:
    names = list(inspect.signature(model.forward).parameters)

    def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            calls.append((loss_of, dict(zip(names, args, strict=False)) | kwargs))

    return note


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
