"""What runs the layers: the backbone's own modules in torch, or graphs of them in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from lightning_mue.backbones import Backbone, EncoderStream
from lightning_mue.inference.torch_executor import TorchExecutor

RUNTIMES = {"torch": (None, "bfloat16", "float16"), "onnxruntime": (None, "int8")}
"""Name -> precisions that a policy may ask for; None is the model's own."""


@dataclass(frozen=True)
class Runtime:
    """A backbone made ready to run.

    Args:
        streams: those before the decoder.
        executor: makes the executor of a batch, called as `TorchExecutor` is.
        held: what is shared between engines for as long as one of them holds it.
    """

    streams: Sequence[EncoderStream]
    executor: Callable[..., TorchExecutor]
    held: Any = None


def make_runtime(name: str, backbone: Backbone, precision: str | None) -> Runtime:
    """Return a backbone made ready to run.

    Args:
        name: one of ``RUNTIMES``.
        backbone: in the precision asked for, if it is one of torch.
        precision: of the policy.

    Raises:
        ValueError: no such runtime, or it does not compute in this precision or on the model's device.
        ImportError: it is not installed.
    """
    if name not in RUNTIMES:
        raise ValueError(f"`runtime` must be one of {list(RUNTIMES)}, got {name!r}")
    if precision not in RUNTIMES[name]:
        able = [other for other, precisions in RUNTIMES.items() if precision in precisions]
        raise ValueError(f"The policy asks for {precision!r}, which runtime {name!r} does not compute in; take {able}")
    if name == "torch":
        return Runtime(backbone.encoders, TorchExecutor)
    one = next(backbone.model.parameters())
    if one.device.type != "cpu" or one.dtype != torch.float32:
        raise ValueError(
            f"Runtime {name!r} takes models in float32 on the CPU, got {one.dtype} on {one.device}; move it there, or "
            "take 'torch'"
        )
    from lightning_mue.inference.ort_executor import OrtExecutor
    from lightning_mue.inference.sessions import shared_sessions

    sessions = shared_sessions(backbone, precision or "float32")
    return Runtime(sessions.streams, partial(OrtExecutor, sessions.decoder), sessions)
