"""What runs the layers: the backbone's own modules in torch, or graphs of them in ONNX Runtime."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from lightning_mue.backbones import Backbone, EncoderStream
from lightning_mue.backbones.pieces import NoPieces
from lightning_mue.inference.fastest import FastestStream, fastest
from lightning_mue.inference.stopwatch import Stopwatch
from lightning_mue.inference.torch_executor import TorchExecutor

RuntimeName = Literal["torch", "onnxruntime"]

RUNTIMES: dict[RuntimeName, tuple[str | None, ...]] = {
    "torch": (None, "bfloat16", "float16"),
    "onnxruntime": (None, "int8", "int8_rows"),
}
"""Name -> precisions that a policy may ask for; None is the model's own."""

AUTO = "auto"
"""Of the runtimes that can, the one that is faster here and now, for the decoder and for each stream before it."""


@dataclass(frozen=True)
class Runtime:
    """A backbone made ready to run.

    Args:
        name: one of ``RUNTIMES``.
        streams: those before the decoder.
        executor: makes the executor of a batch, called as `TorchExecutor` is.
        held: what is shared between engines for as long as one of them holds it.
    """

    name: str
    streams: Sequence[EncoderStream]
    executor: Callable[..., Any]
    held: Any = None


def make_runtime(name: str, backbone: Backbone, precision: str | None) -> Runtime:
    """Return a backbone made ready to run.

    Args:
        name: one of ``RUNTIMES``, or ``AUTO``.
        backbone: in the precision asked for, if it is one of torch.
        precision: of the policy.

    Raises:
        ValueError: no such runtime, or it does not compute in this precision or on the model's device.
        ImportError: it is not installed.
    """
    if name == AUTO:
        return _fastest(backbone, precision)
    if name not in RUNTIMES:
        raise ValueError(f"`runtime` must be one of {[*RUNTIMES, AUTO]}, got {name!r}")
    if precision not in RUNTIMES[name]:
        able = [other for other, precisions in RUNTIMES.items() if precision in precisions]
        raise ValueError(f"The policy asks for {precision!r}, which runtime {name!r} does not compute in; take {able}")
    if name == "torch":
        return torch_runtime(backbone)
    if not _is_plain(backbone):
        one = next(backbone.model.parameters())
        raise ValueError(
            f"Runtime {name!r} takes models in float32 on the CPU, got {one.dtype} on {one.device}; move it there, or "
            "take 'torch'"
        )
    from lightning_mue.inference.sessions import make_executor, shared_sessions

    sessions = shared_sessions(backbone, precision or "float32")
    return Runtime(name, sessions.streams, partial(make_executor, sessions.decoder), sessions)


def in_precision(model: nn.Module, precision: str | None) -> nn.Module:
    """Return the model if it computes in this precision, else a copy of it that does."""
    if precision not in RUNTIMES["torch"] or precision is None:
        return model
    dtype = getattr(torch, precision)
    return model if dtype == next(model.parameters()).dtype else copy.deepcopy(model).to(dtype)


def torch_runtime(backbone: Backbone) -> Runtime:
    """Return the backbone's own modules."""
    return Runtime("torch", backbone.encoders, TorchExecutor)


def _is_plain(backbone: Backbone) -> bool:
    one = next(backbone.model.parameters())
    return one.device.type == "cpu" and one.dtype == torch.float32


def _fastest(backbone: Backbone, precision: str | None) -> Runtime:
    """Return the runtime that takes a step of one row through all layers sooner; each other stream chooses alone."""
    able = [name for name, precisions in RUNTIMES.items() if precision in precisions]
    if able != list(RUNTIMES):
        return make_runtime(able[0], backbone, precision)
    plain = torch_runtime(backbone)
    if not _is_plain(backbone):
        return plain
    try:
        others = [make_runtime(name, backbone, precision) for name in able if name != plain.name]
    except (ImportError, NoPieces):
        return plain
    rivals = [plain, *others]
    with torch.inference_mode():
        chosen = rivals[fastest([_step(rival, backbone) for rival in rivals])]
    streams = zip(*(rival.streams for rival in rivals), strict=True)
    return replace(chosen, streams=[FastestStream(of_name) for of_name in streams], held=tuple(r.held for r in rivals))


def _step(runtime: Runtime, backbone: Backbone) -> Callable[[], None]:
    """Return what takes one position of one row through all layers."""
    decoder = backbone.decoder
    memory_BSD = torch.zeros(1, 64, decoder.memory_width)
    executor = runtime.executor(backbone, None, memory_BSD, None, 1, (), Stopwatch(memory_BSD.device, False))
    executor.embed([0], 0, [[0]])

    def step() -> None:
        for layer in range(1, decoder.num_layers + 1):
            executor.run_layer(layer, [(0, 1, [0])])

    return step
