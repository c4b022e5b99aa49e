"""What runs the layers: the backbone's own modules in torch, or graphs of them in ONNX Runtime."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, Literal

import torch
from torch import nn

from lightning_mue.backbones import Backbone, EncoderStream
from lightning_mue.inference.stopwatch import Stopwatch
from lightning_mue.inference.torch_executor import TorchExecutor

RuntimeName = Literal["torch", "onnxruntime"]

RUNTIMES: dict[RuntimeName, tuple[str | None, ...]] = {
    "torch": (None, "bfloat16", "float16"),
    "onnxruntime": (None, "int8"),
}
"""Name -> precisions that a policy may ask for; None is the model's own."""

AUTO = "auto"
"""Of the runtimes that can, the one whose decoder takes a step sooner here and now."""

_TRIES = 15


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
    executor: Callable[..., TorchExecutor]
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
    from lightning_mue.inference.ort_executor import OrtExecutor
    from lightning_mue.inference.sessions import shared_sessions

    sessions = shared_sessions(backbone, precision or "float32")
    return Runtime(name, sessions.streams, partial(OrtExecutor, sessions.decoder), sessions)


def in_precision(model: nn.Module, precision: str | None) -> nn.Module:
    """Return the model if it computes in this precision, else a copy of it that does."""
    dtype = next(model.parameters()).dtype if precision in (None, "int8") else getattr(torch, precision or "")
    return model if dtype == next(model.parameters()).dtype else copy.deepcopy(model).to(dtype)


def torch_runtime(backbone: Backbone) -> Runtime:
    """Return the backbone's own modules."""
    return Runtime("torch", backbone.encoders, TorchExecutor)


def _is_plain(backbone: Backbone) -> bool:
    one = next(backbone.model.parameters())
    return one.device.type == "cpu" and one.dtype == torch.float32


def _fastest(backbone: Backbone, precision: str | None) -> Runtime:
    """Return the runtime that takes a step of one row through all layers sooner; torch where nothing else can."""
    able = [name for name, precisions in RUNTIMES.items() if precision in precisions]
    if able != list(RUNTIMES):
        return make_runtime(able[0], backbone, precision)
    plain = torch_runtime(backbone)
    if not _is_plain(backbone):
        return plain
    try:
        others = [make_runtime(name, backbone, precision) for name in able if name != plain.name]
    except ImportError:
        return plain
    rivals = [plain, *others]
    with torch.inference_mode():
        steps, ms = [_step(rival, backbone) for rival in rivals], [list[float]() for _ in rivals]
        for _ in range(_TRIES + 1):  # in turn: drift of the machine hits all alike
            for step, of_rival in zip(steps, ms, strict=True):
                begin = time.perf_counter()
                step()
                of_rival.append(time.perf_counter() - begin)
    return min(zip(rivals, ms, strict=True), key=lambda pair: median(pair[1][1:]))[0]


def _step(runtime: Runtime, backbone: Backbone) -> Callable[[], None]:
    """Return what takes one position of one row through all layers."""
    decoder = backbone.decoder
    memory_BSD = torch.zeros(1, 64, decoder.width)
    executor = runtime.executor(backbone, None, memory_BSD, None, 1, (), Stopwatch(memory_BSD.device, False))
    executor.embed([0], 0, [[0]])

    def step() -> None:
        for layer in range(1, decoder.num_layers + 1):
            executor.run_layer(layer, [(0, 1, [0])])

    return step
