"""What this machine is, and what it does at its best."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import time
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_mue.benchmark.limits import BYTES, Machine

PACKAGES = ("lightning-mue", "torch", "transformers", "onnxruntime", "numpy")
SIDE, TRIES, LEAST_BYTES = 1024, 9, 1 << 20
MOST_BYTES, AT_ONCE = 1 << 30, 1 << 27

Clock = Callable[[], float]


@torch.inference_mode()
def measure_machine(
    precision: str, weights: int, device: torch.device | str = "cpu", clock: Clock = time.perf_counter
) -> Machine:
    """Return what the machine reads and multiplies in a second, at best, with the threads of torch.

    Args:
        precision: one of ``limits.BYTES``.
        weights: so many are read again and again: what fits into a cache is read from there, as a model's would be.
        device: that computes.
        clock: seconds.
    """
    size = min(max(weights * BYTES[precision][0], LEAST_BYTES), MOST_BYTES)
    matrix, vector = torch.ones(size // (4 * SIDE), SIDE, device=device), torch.ones(SIDE, device=device)
    read = _best(lambda: matrix @ vector, -(-AT_ONCE // size), clock)
    multiply = min(_best(product, 1, clock) for product in _products(precision, torch.device(device)))
    return Machine(precision, matrix.numel() * 4 / read, SIDE**3 / multiply)


def _products(precision: str, device: torch.device) -> list[Callable[[], Any]]:
    """Return ways to multiply large matrices in a precision; a higher one will do where it is the faster."""
    a = torch.randn(SIDE, SIDE, device=device)
    found: list[Callable[[], Any]] = [lambda: a @ a]
    if precision in ("bfloat16", "float16"):
        low = a.to(getattr(torch, precision))
        found.append(lambda: low @ low)
    if BYTES[precision][0] == 1 and device.type == "cpu":
        with warnings.catch_warnings(action="ignore"):  # deprecated, without another one for CPUs in torch itself
            linear = torch.ao.quantization.quantize_dynamic(
                nn.Sequential(nn.Linear(SIDE, SIDE)), {nn.Linear}, dtype=torch.qint8
            )
        found.append(lambda: linear(a))
        with contextlib.suppress(ImportError):  # ONNX Runtime's is the faster where a processor has tiles (AMX)
            found.append(_int8_product())
    return found


def _int8_product() -> Callable[[], Any]:
    """Return a product of 8 bits in ONNX Runtime."""
    from lightning_mue.inference.product_graph import product_graph
    from lightning_mue.inference.session import Session

    weights = {name: np.ones(shape, np.float32) for name, shape in (("scale", SIDE), ("norms", (2, SIDE)))}
    weights |= {"weight": np.ones((SIDE, SIDE), np.int8)}
    session = Session(product_graph(SIDE, SIDE), torch.get_num_threads(), weights)
    states, out = np.ones((SIDE, SIDE), np.uint8), np.empty((SIDE, SIDE), np.float32)
    return lambda: session.into((states, np.ones(2, np.float32)), (out,))


def _best(run: Callable[[], Any], times: int, clock: Clock) -> float:
    """Return the seconds of one run: the best of some tries, each of so many runs."""
    run()
    best = float("inf")
    for _ in range(TRIES):
        _synchronise()
        begin = clock()
        for _ in range(times):
            run()
        _synchronise()
        best = min(best, (clock() - begin) / times)
    return best


def _synchronise() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def hardware(device: torch.device) -> str:
    """Return what the device is called and how many cores there are, without the name of the host."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine() + ' CPU'}, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    """Return package -> version, of those installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def today() -> str:
    """Return the date, ISO."""
    return datetime.datetime.now(tz=datetime.UTC).date().isoformat()
