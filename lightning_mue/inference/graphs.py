"""Modules as ONNX graphs: exported from the module that trains, once for all layers of one kind.

Layers of a stack differ in nothing but their weights. So the first of a kind is exported, and every layer is that
template with its own weights put in. Templates and quantised graphs take seconds each; they are kept on disk, under a
hash of all that they are made of.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mue.files import write_bytes
from lightning_mue.inference import quantise

OPSET = 20
PRECISIONS = ("float32", "int8", "int8_rows")
"""In 8 bits are matrices and, as it comes, what they multiply: all of it together, or (``int8_rows``) row by row."""


class Graphs:
    """Makes graphs of modules, as bytes.

    Args:
        precision: one of ``PRECISIONS``.
        folder: keeps what takes long; ``~/.cache/lightning_mue/graphs`` (or below ``XDG_CACHE_HOME``) if not given.

    Raises:
        ValueError: an unknown precision, or one that this machine has no exact products of.

    Attributes:
        levels: the largest integer weight of 8 bits; None in float32.
    """

    def __init__(self, precision: str = "float32", folder: Path | None = None) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"Graphs are of one of the precisions {list(PRECISIONS)}, got {precision!r}")
        self.precision, self._folder = precision, folder or _cache_folder()
        self.levels = None if precision == "float32" else quantise.weight_levels()

    def make(self, module: nn.Module, *examples: Tensor, free: Sequence[Sequence[int]] | None = None) -> bytes:
        """Return the graph of a module.

        Args:
            module: gets and gives tensors; names weights that it never reads in ``unread``, if it has any.
            *examples: what it may be given.
            free: axes of each example that may be of any size; all but the last if not given.

        Raises:
            ValueError: the export put weights into the graph that cannot be told apart.
        """
        axes = tuple(tuple(range(e.ndim - 1)) for e in examples) if free is None else tuple(map(tuple, free))
        plain = with_weights(self._template(module, examples, axes), module)
        if self.levels is None:
            return plain
        levels, rounded = self.levels, {"int8": quantise.by_tensor, "int8_rows": quantise.by_row}[self.precision]
        key = hashlib.sha256(f"{levels} {_source(quantise)}".encode() + plain)
        with quiet():
            return self._kept(self.precision, key, lambda: rounded(plain, levels))

    def _template(self, module: nn.Module, examples: Sequence[Tensor], free: tuple[tuple[int, ...], ...]) -> bytes:
        made_of = [
            re.sub(r"DropPath\(.*\)", "DropPath", repr(module)),
            *_sources(module),
            *map(repr, sorted(_numbers(module).items())),
        ]
        made_of += [str(tuple(weight.shape)) for weight in module.state_dict().values()]
        for example, axes in zip(examples, free, strict=True):
            made_of.append(str([None if axis in axes else size for axis, size in enumerate(example.shape)]))
        made_of += [f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "onnxscript")]
        key = hashlib.sha256("\n".join([*made_of, str(OPSET)]).encode())
        return self._kept("template", key, lambda: _exported(module, examples, free))

    def _kept(self, what: str, key: Any, make: Callable[[], bytes]) -> bytes:
        path = self._folder / f"{what}-{key.hexdigest()[:24]}.onnx"
        if not path.exists():
            write_bytes(path, make())
        return path.read_bytes()


def with_weights(template: bytes, module: nn.Module) -> bytes:
    """Return the template's graph with the weights of a module of the same kind.

    Raises:
        ValueError: a weight has no place: it was folded into another, and the template's own would be used instead.
    """
    import onnx

    model, unread = onnx.ModelProto.FromString(template), getattr(module, "unread", ())
    weights = {name: tensor for name, tensor in module.state_dict().items() if name not in unread}
    for initializer in model.graph.initializer:
        if (tensor := weights.pop(initializer.name, None)) is not None:
            tensor = tensor.float() if tensor.is_floating_point() else tensor
            array = tensor.detach().cpu().contiguous().numpy()
            initializer.CopyFrom(onnx.numpy_helper.from_array(array, initializer.name))
    if weights:
        raise ValueError(f"The graph of {type(module).__name__} has no place for its weights {sorted(weights)}")
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def _exported(module: nn.Module, examples: Sequence[Tensor], free: Sequence[Sequence[int]]) -> bytes:
    """Return the graph of a module without its weights."""
    # Without gradients: attention whose mask is made of weights, such as Swin's, would else be traced as two kernels.
    module, chance = copy.deepcopy(module).float().eval().requires_grad_(False), torch.Generator().manual_seed(0)
    for tensor in module.state_dict().values():  # equal weights, such as biases of 0, would be merged into one
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=chance))
    examples = [example.clone() for example in examples]  # one tensor given twice would become one input
    shapes = tuple(dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for axes in free)
    how: dict[str, Any] = {"dynamo": True, "opset_version": OPSET, "verbose": False}
    with quiet():  # not optimised: weights would be folded and lose their names; a session folds them anyway
        program = torch.onnx.export(module, tuple(examples), dynamic_shapes=shapes, optimize=False, **how)
    assert program is not None
    model, names = program.model_proto, {*module.state_dict()}
    del model.graph.value_info[:]  # shapes from before the quantiser's own rewriting, on which it would stumble
    for node in model.graph.node:
        node.ClearField("metadata_props")  # in which source file a node began
        node.ClearField("doc_string")
    for initializer in model.graph.initializer:
        if initializer.name in names:
            initializer.ClearField("raw_data")
    data: bytes = model.SerializeToString(deterministic=True)
    return data


_IDLE = ("layer_idx", "layer_num", "drop_prob")
"""Numbers in which transformers' layers of a kind differ and of which no graph holds anything: whose place in a cache a
layer's K/V have (layers are exported without caches), and how much training drops. A module of others may compute with
what it calls so."""


def _numbers(module: nn.Module) -> dict[str, float]:
    """Return the numbers that an export may write into the graph, which no weight shows."""
    return {
        f"{name}.{key}": value
        for name, part in module.named_modules()
        for key, value in vars(part).items()
        if isinstance(value, (int, float)) and not key.startswith("_")
        if key not in _IDLE or not type(part).__module__.startswith("transformers.")
    }


def _sources(module: nn.Module) -> list[str]:
    """Return the code of a module and of all that it is made of."""
    kinds: dict[str, Any] = {
        f"{type(part).__module__}.{type(part).__qualname__}": type(part) for part in module.modules()
    }
    return [_source(kind) for _, kind in sorted(kinds.items())]


@cache
def _source(of: Any) -> str:
    return inspect.getsource(of)  # parses a whole file for each class


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_mue" / "graphs"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep exporters' progress and advice to themselves; errors are raised all the same."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
