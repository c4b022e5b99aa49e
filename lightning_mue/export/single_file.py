"""Single-file graphs: each stream before the decoder as one ONNX file, its exits as nested ``If``.

For runtimes without Python. A file is the stream itself, exported together with its decisions: layers above the exit
that is taken are not run. One path is run for the whole batch, so its rows leave together, where all of them may.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_mue.backbones import EncoderStream, view
from lightning_mue.exits import attached
from lightning_mue.export.function_graph import parts_read
from lightning_mue.inference.check import check_policy
from lightning_mue.inference.encode import stream_scores
from lightning_mue.inference.graphs import OPSET, quiet
from lightning_mue.inference.sessions import check_installed
from lightning_mue.policy import ExitPolicy, ExitRule

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

THRESHOLDS, DEPTH = "thresholds", "depth"
"""What a file takes and gives beside states."""

STATES, LEFT = "states", "left"
"""Of the last layer, and those with which the batch leaves, wherever it does."""

LARGEST = 1_500_000_000
"""Bytes of weights in a graph; protobuf allows 2 GB of everything. More lie beside it."""


@torch.no_grad()
def export_graphs(
    model: nn.Module,
    policy: ExitPolicy,
    folder: str | os.PathLike[str],
    inputs: Mapping[str, Any],
    fold: bool = False,
) -> list[Path]:
    """Write ``<stream>.onnx`` for each stream before the decoder.

    A file takes by name what its stream reads: inputs of the backbone (``pixel_values``, or ``input_ids``,
    ``attention_mask`` and ``bbox``) and what the files of earlier streams gave (``vision``, or ``image``). It gives
    what later streams or the decoder read, under the stream's name, and ``depth``, int64 ``[]``: after which layer the
    batch left. That is the first exit at which the scores of all rows reach its threshold. ``thresholds``, float32
    ``[E]``, one for each exit of the stream's rule and ``inf`` where it must not be taken, may be given too; if not,
    the policy's hold.
    Batch and length of the prompt are free, the size of the picture is not.

    Args:
        model: a supported backbone in float32, with exits attached if the policy needs them; it stays as it is.
        policy: which streams are left where; the others run at full depth.
        folder: where to. Weights of more than 1.5 GB lie beside their graph, in ``<stream>.onnx.data``.
        inputs: of a sample, as the backbone takes them: they say which there are, and the size of the picture.
        fold: make the thresholds part of the graphs; an exit that is never taken and layers that are never reached are
            left out.

    Returns:
        The files, in the order the streams run.

    Raises:
        ValueError: the policy does not fit the model, or asks for what these graphs do not do.
        ImportError: onnx, onnxscript or onnxruntime is not installed.
    """
    check_installed()
    check_plain(model, policy)
    model = copy.deepcopy(model).cpu().eval()
    backbone = view(model)
    check_policy(policy, backbone, attached(model))
    given = {n: torch.cat([inputs[n][:1].cpu()] * 2) for n in backbone.generate_inputs if inputs.get(n) is not None}
    paths = []
    for stream in backbone.encoders:
        whole = _Whole(model, stream, policy.rules.get(stream.name), fold, given)
        paths.append(_saved(_single_file(whole, given), Path(folder, f"{stream.name}.onnx")))
        given[stream.name] = whole(*given.values(), *whole.thresholds())[-1]
    return paths


class _Whole(nn.Module):
    """A stream at full depth, and what every exit would decide and give on the way.

    Args:
        model: holds the weights.
        stream: of the model's view.
        rule: of the stream; None is full depth.
        fold: whether its thresholds hold for good.
        given: tensors that come before the thresholds, by name.
    """

    def __init__(
        self, model: nn.Module, stream: EncoderStream, rule: ExitRule | None, fold: bool, given: Mapping[str, Tensor]
    ) -> None:
        super().__init__()
        self.stream, self.names, self.fold = stream, [*given], fold or rule is None
        self.attached = partial(attached, model)  # the model itself would be a part of this one
        rule = rule or ExitRule("static", (stream.num_layers,), (torch.inf,))
        self.signal = rule.signal
        self.at = rule.reachable if self.fold else dict(zip(rule.layers, rule.thresholds, strict=True))
        always = self.fold and self.signal == "static"
        self.depth = min(self.at, default=stream.num_layers) if always else stream.num_layers
        self.exits = [k for k in self.at if k < self.depth]
        self.parts = parts_read(model, lambda: self(*given.values(), *self.thresholds()))

    def thresholds(self) -> list[Tensor]:
        """Return the thresholds ``[E]`` if they are free."""
        return [] if self.fold else [torch.tensor([*self.at.values()])]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return whether the batch leaves, and the states with which it would, of each exit and the end; the result."""
        given, exits, found = dict(zip(self.names, tensors, strict=False)), self.attached(), list[Tensor]()
        state = self.stream.prologue(given, given)
        for k in range(1, self.depth + 1):
            before_BTD, state.h_BTD = state.h_BTD, self.stream.layer(k, state)
            left_BTD = state.h_BTD if exits is None else exits.adapt(self.stream.name, k, state.h_BTD)
            if k in self.exits:
                score_B = stream_scores(exits, self.signal, self.stream.name, k, state, before_BTD)
                threshold = self.at[k] if self.fold else tensors[-1][self.exits.index(k)]
                found += [(score_B >= threshold).all(), left_BTD]
        return *found, left_BTD, self.stream.epilogue(state.at(left_BTD))


def _single_file(whole: _Whole, given: Mapping[str, Tensor]) -> ModelProto:
    """Return a stream's graph that runs no layer above the exit taken, and takes no more than it reads."""
    from onnx import TensorProto, helper, numpy_helper

    model, result = _exported(whole, given), whole.stream.name
    graph, nodes = model.graph, [*model.graph.node]
    epilogue = _needed([node for node in nodes if STATES not in node.output], [result])
    last = _reached(epilogue, STATES)
    for node in last:
        node.input[:] = [LEFT if name == STATES else name for name in node.input]
    climb = _climb(_without(nodes, epilogue), whole.exits, whole.depth)
    read = {name for node in nodes for name in node.input}
    inputs = [value for value in graph.input if value.name in read]
    output = next(value for value in graph.output if value.name == result)
    depth = helper.make_tensor_value_info(DEPTH, TensorProto.INT64, [])
    weights = [tensor for tensor in graph.initializer if tensor.name in read]
    weights += [numpy_helper.from_array(tensor.numpy(), THRESHOLDS) for tensor in whole.thresholds()]
    nodes = [*_without(epilogue, last), *climb, *last]
    graph = helper.make_graph(nodes, result, inputs, [output, depth], weights)
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def _climb(nodes: Sequence[NodeProto], exits: Sequence[int], depth: int, where: str = "") -> list[NodeProto]:
    """Return what gives the states with which the batch leaves, and the depth: what lies above an exit, below its If.

    Args:
        nodes: of the stream at full depth and of all its exits, each after those that it reads.
        exits: that may still be taken.
        depth: of the end.
        where: ends the names of what is given.
    """
    from onnx import helper

    if not exits:
        return _end(nodes, STATES, depth, where)
    k, *above = exits
    decision, end = f"leaves_{k}", f"left_{k}"
    higher = _needed(nodes, [STATES, *(f"{what}_{j}" for j in above for what in ("leaves", "left"))])
    own = _without(_needed(nodes, [end]), higher)
    first = _needed(_without(nodes, own), [decision, end, *(name for node in own for name in node.input)])
    rest, here, there = _without(nodes, first), f"_at_{k}", f"_above_{k}"
    then = _branch(_end(rest, end, k, here), here)
    otherwise = _branch(_climb(rest, above, depth, there), there)
    how: dict[str, Any] = {"name": f"exit_{k}", "then_branch": then, "else_branch": otherwise}
    return [*first, helper.make_node("If", [decision], [LEFT + where, DEPTH + where], **how)]


def _end(nodes: Sequence[NodeProto], states: str, depth: int, where: str) -> list[NodeProto]:
    """Return what gives these states and this depth, under new names."""
    from onnx import helper

    left = helper.make_node("Identity", [states], [LEFT + where], name=LEFT + where)
    deep = helper.make_node("Constant", [], [DEPTH + where], name=DEPTH + where, value_int=depth)
    return [*_needed(nodes, [states]), left, deep]


def _branch(nodes: Sequence[NodeProto], where: str) -> GraphProto:
    from onnx import TensorProto, helper

    states = helper.make_tensor_value_info(LEFT + where, TensorProto.FLOAT, None)
    depth = helper.make_tensor_value_info(DEPTH + where, TensorProto.INT64, [])
    return helper.make_graph(nodes, where.strip("_"), [], [states, depth])


def _needed(nodes: Sequence[NodeProto], names: Iterable[str]) -> list[NodeProto]:
    """Return the nodes on which what has these names depends, in order."""
    found: list[NodeProto] = []
    wanted = {*names}
    for node in reversed(nodes):
        if not wanted.isdisjoint(node.output):
            wanted.update(node.input)
            found.append(node)
    return found[::-1]


def _reached(nodes: Sequence[NodeProto], name: str) -> list[NodeProto]:
    """Return the nodes that depend on what has this name, in order."""
    found: list[NodeProto] = []
    reached = {name}
    for node in nodes:
        if not reached.isdisjoint(node.input):
            reached.update(node.output)
            found.append(node)
    return found


def _without(nodes: Sequence[NodeProto], others: Sequence[NodeProto]) -> list[NodeProto]:
    gone = {node.output[0] for node in others}
    return [node for node in nodes if node.output[0] not in gone]


def _exported(whole: _Whole, given: Mapping[str, Tensor]) -> ModelProto:
    """Return the graph of a whole stream; batch and length of the prompt are free."""
    from onnxscript import opset20

    free = dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)
    is_fixed = {name: tensor.is_floating_point() and name != "bbox" for name, tensor in given.items()}
    shapes = [{0: free[0]} if is_fixed[name] else free for name in given]
    thresholds = whole.thresholds()
    exits = [name for k in whole.exits for name in (f"leaves_{k}", f"left_{k}")]
    how: dict[str, Any] = {"dynamo": True, "opset_version": OPSET, "optimize": True, "verbose": False}
    how["input_names"] = [*whole.names, THRESHOLDS][: len(given) + len(thresholds)]
    how["output_names"] = [*exits, STATES, whole.stream.name]
    how["dynamic_shapes"] = ((*shapes, *({} for _ in thresholds)),)
    how["custom_translation_table"] = {torch.ops.aten._is_all_true.default: opset20.Identity}  # of checks, not asked
    with quiet():
        program = torch.onnx.export(whole, (*given.values(), *thresholds), **how)
    assert program is not None
    model: ModelProto = program.model_proto
    for part in (*model.graph.node, *model.graph.input, *model.graph.output, *model.graph.initializer):
        part.ClearField("metadata_props")  # in which source file it began
    return model


def _saved(model: ModelProto, path: Path) -> Path:
    """Write a graph, aside and renamed."""
    import onnx

    weights = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent, prefix=".") as aside:
        how: dict[str, Any] = {"save_as_external_data": weights > LARGEST, "location": f"{path.name}.data"}
        onnx.save_model(model, Path(aside, path.name), **how)
        for file in sorted(Path(aside).iterdir(), reverse=True):  # weights before the graph that names them
            os.replace(file, path.parent / file.name)
    return path


def check_plain(model: nn.Module, policy: ExitPolicy) -> None:
    """Refuse what the graphs would not do, though the engine does."""
    if policy.groups is not None:
        raise ValueError(f"The policy leaves early for the groups {list(policy.groups)} alone; graphs know no groups")
    dtype = next(model.parameters()).dtype
    if policy.precision is not None or dtype != torch.float32:
        raise ValueError(f"Graphs compute in float32, got a policy in {policy.precision} for a model in {dtype}")
