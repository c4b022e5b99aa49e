"""A function over a model's modules as an ONNX graph: what leads from one stack of layers to the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lightning_mue.inference.graphs import OPSET, quiet


def function_graph(
    model: nn.Module,
    function: Callable[[dict[str, Tensor]], list[Tensor | None]],
    given: Mapping[str, Tensor],
    free: Mapping[str, Sequence[int]],
    outputs: Sequence[str],
) -> bytes:
    """Return the ONNX graph of a function of named tensors; it takes those that the function reads.

    Args:
        model: has the weights that the function reads; those alone are in the graph.
        function: may be called with ``given``; what it gives as None is left out.
        given: what it may be given.
        free: axes of each that may be of any size.
        outputs: names of what the function gives.
    """
    from onnxscript import opset20

    shapes = tuple(dict.fromkeys(free[name], torch.export.Dim.DYNAMIC) for name in given)
    how: dict[str, Any] = {"dynamo": True, "opset_version": OPSET, "verbose": False, "optimize": False}
    how |= {"input_names": [*given], "output_names": [*outputs], "dynamic_shapes": (shapes,)}
    how["custom_translation_table"] = {torch.ops.aten._is_all_true.default: opset20.Identity}  # of checks, not asked
    with quiet():
        program = torch.onnx.export(_Function(model, function, given), tuple(given.values()), **how)
    assert program is not None
    model_proto = program.model_proto
    graph = model_proto.graph
    read = {name for node in graph.node for name in node.input}
    for values in (graph.input, graph.initializer):
        for value in [value for value in values if value.name not in read]:
            values.remove(value)
    del graph.value_info[:]
    for node in graph.node:  # in which source file a node began
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    data: bytes = model_proto.SerializeToString(deterministic=True)
    return data


def parts_read(model: nn.Module, run: Callable[[], object]) -> nn.ModuleList:
    """Return the modules whose weights are read when ``run`` is called.

    An export must find them among the parts of what it exports, and takes the longer the more it finds.
    """
    with _Read() as read:
        run()
    return nn.ModuleList(part for part in model.modules() if not read.found.isdisjoint(_own(part)))


class _Read(TorchFunctionMode):
    """Notes which tensors are read."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found |= {id(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        return func(*args, **(kwargs or {}))


class _Function(nn.Module):
    """A function over a model's modules, as a module that holds those whose weights it reads."""

    def __init__(
        self,
        model: nn.Module,
        function: Callable[[dict[str, Tensor]], list[Tensor | None]],
        given: Mapping[str, Tensor],
    ) -> None:
        super().__init__()
        self.parts = parts_read(model, lambda: function({**given}))
        self.function, self.names = function, [*given]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return what the function gives; copies, for an output must not be an input under another name."""
        found = self.function(dict(zip(self.names, tensors, strict=True)))
        return tuple(tensor.clone() for tensor in found if tensor is not None)


def _own(part: nn.Module) -> set[int]:
    return {id(tensor) for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False))}
