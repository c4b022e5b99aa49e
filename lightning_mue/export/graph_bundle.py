"""A bundle of graphs: what it must be made of, and the check that it does what its model does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from lightning_mue.backbones import fingerprint, view
from lightning_mue.backbones.processor import Processor
from lightning_mue.exits import attached
from lightning_mue.export.graph_files import write_graphs
from lightning_mue.inference.encode import encode
from lightning_mue.inference.runtime import RUNTIMES, RuntimeName
from lightning_mue.inference.sessions import check_installed
from lightning_mue.inference.stopwatch import Stopwatch
from lightning_mue.policy import ExitPolicy
from lightning_mue.portable.names import PROCESSOR
from lightning_mue.portable.processor import PortableProcessor

RUNTIME: RuntimeName = "onnxruntime"
_KNOWN = {"pixel_values", "input_ids", "attention_mask", "decoder_prompt"}
"""What a processor without transformers makes of a picture and a prompt."""
_NEAR = 1e-3
"""Of the memory's largest number; float32 graphs differ by some 1e-6."""
_TEXTS = ("what is this ?", " Two  spaces, a comma\u2014and \u00fc\u00e9 \u4e16", "a")
_SIZES = ((37, 211), (301, 64), (5, 5))


def save_graphs(model: nn.Module, policy: ExitPolicy, processor: Processor | None, folder: Path, runtime: str) -> None:
    """Write a model as graphs into a folder that holds its policy and its processor, and read them back.

    Args:
        model: a supported backbone in float32 on the CPU; it stays as it is.
        policy: of the bundle.
        processor: of the model.
        folder: of the bundle.
        runtime: ``onnxruntime``.

    Raises:
        ValueError: what graphs cannot be made of, or graphs or processor that do something else than the originals.
        ImportError: onnx, onnxscript or onnxruntime is not installed.
    """
    _check_able(model, policy, processor, runtime)
    assert processor is not None
    check_installed()
    with _in_eval_mode(model):
        _check_processor(processor, PortableProcessor(folder / PROCESSOR, processor.tasks))
        write_graphs(model, policy, processor, folder, fingerprint(model))
        _check_answers(model, processor, folder)


def _check_able(model: nn.Module, policy: ExitPolicy, processor: Processor | None, runtime: str) -> None:
    one = next(model.parameters())
    if runtime != RUNTIME:
        raise ValueError(f"Bundles of graphs are for runtime {RUNTIME!r}, got {runtime!r}")
    if policy.precision not in RUNTIMES[RUNTIME]:
        able = [precision or "the model's own" for precision in RUNTIMES[RUNTIME]]
        raise ValueError(f"{RUNTIME!r} computes in {' or '.join(able)}, and the policy asks for {policy.precision!r}")
    if policy.groups is not None and policy.precision is not None:
        raise ValueError(
            f"The policy runs the groups {list(policy.groups)} in {policy.precision} and all others as the model is; a "
            "bundle of graphs holds one precision. Freeze it without `runtime`."
        )
    if one.device.type != "cpu" or one.dtype != torch.float32:
        raise ValueError(f"Graphs are made of models in float32 on the CPU, got {one.dtype} on {one.device}; move it")
    reads = view(model).generate_inputs
    if "pixel_values" not in reads or not {*reads} <= _KNOWN:
        raise ValueError(
            f"A bundle of graphs answers pictures and prompts, and {type(model).__name__} reads {list(reads)}. Freeze "
            "it without `runtime`; loaded with torch, it runs in 'onnxruntime' too."
        )
    if processor is None:
        raise ValueError("A bundle of graphs needs a `processor`: pictures have the size that it makes them")


def _check_processor(theirs: Processor, ours: PortableProcessor) -> None:
    """Compare with the original on a few pictures and texts."""
    chance = np.random.default_rng(0)
    images = [Image.fromarray(chance.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in _SIZES]
    expected, found = theirs(images, _TEXTS), ours(images, _TEXTS)
    pairs = [(name, expected[name], array) for name, array in found.items()]
    pairs.append(("labels", theirs.labels(_TEXTS), ours.labels(_TEXTS)))
    pairs.append(("decoder prompts", theirs.decoder_prompts(_TEXTS), ours.decoder_prompts(_TEXTS)))
    for name, tensor, array in pairs:
        _check_same(f"the processor's {name}", tensor.numpy(), array, 1e-5)
    if theirs.decode(theirs.labels(_TEXTS)) != ours.decode(ours.labels(_TEXTS)):
        raise ValueError("The processor's texts are others without transformers; unset how it cleans them up")


def _check_answers(model: nn.Module, processor: Processor, folder: Path) -> None:
    """Compare what the decoder reads with the model's own, and let the engine speak."""
    from lightning_mue.portable.encode import encode as encode_arrays
    from lightning_mue.portable.engine import PortableEngine

    engine, backbone = PortableEngine(folder), view(model)
    inputs = processor([Image.new("RGB", size, "red") for size in _SIZES], _TEXTS)
    arrays: dict[str, Any] = {name: inputs[name].numpy() for name in backbone.generate_inputs if name in inputs}
    found = encode_arrays(engine.files, arrays, {}, Stopwatch(None, False)).memory_BSD
    with torch.no_grad():
        silent = Stopwatch(torch.device("cpu"), False)
        memory_BSD = encode(backbone, attached(model), inputs, {}, silent).memory_BSD.numpy()
    if engine.files.facts["precision"] == "float32":
        _check_same("the graphs' memory", memory_BSD, found, _NEAR * np.abs(memory_BSD).max())
    groups = None if engine.policy.groups is None else [engine.policy.groups[0]] * len(_TEXTS)
    engine.generate(2, groups=groups, **arrays)


def _check_same(what: str, expected: Any, found: Any, near: float) -> None:
    if expected.shape != found.shape or not np.allclose(expected, found, rtol=0, atol=near):
        error = np.abs(expected - found).max() if expected.shape == found.shape else f"shape {found.shape}"
        raise ValueError(
            f"Of this model {what} would be others without torch: off by {error}, shape {expected.shape}. Freeze it "
            "without `runtime`."
        )


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    modes: Sequence[tuple[nn.Module, bool]] = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
