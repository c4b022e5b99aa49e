"""Matrices of 8 bits: how a graph's float32 matrices, and what they multiply, are rounded.

x86 without VNNI adds two such products in 16 bits, where they overflow and nothing says so. There integer weights are
half as large.
"""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from lightning_mue.inference.int8_product import PROBE, STATE_LEVELS, WEIGHT_LEVELS, largest_weight

_MICROSOFT = "com.microsoft"


@cache
def weight_levels() -> int:
    """Return the largest integer weight on this machine.

    Raises:
        ValueError: it multiplies no 8 bits exactly.
    """
    from lightning_mue.inference.product_graph import product_graph

    if (levels := largest_weight(product_graph(*PROBE), *PROBE)) is None:
        raise ValueError("ONNX Runtime's products of 8 bits are not exact on this machine; take precision 'float32'")
    return levels


def by_tensor(graph: bytes, levels: int) -> bytes:
    """Round weights with one scale for each output, and what they multiply with one scale for all of it.

    The fastest form; what a row gets depends a little on the rows beside it. Convolutions stay in float32: those of
    vision towers go channel by channel, and with 8 bits they take half of a layer's time.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        plain, quantised = Path(folder, "plain.onnx"), Path(folder, "quantised.onnx")
        plain.write_bytes(_folded(graph))
        less = levels < WEIGHT_LEVELS[0]
        how = {"per_channel": True, "reduce_range": less, "weight_type": QuantType.QInt8}
        quantize_dynamic(plain, quantised, op_types_to_quantize=["Gemm", "MatMul"], **how)
        return quantised.read_bytes()


def by_row(graph: bytes, levels: int) -> bytes:
    """Round weights with one scale for each output, and what they multiply with a scale for each of its rows.

    What a row gets is its own, to the last bit, and one with large numbers takes no precision from the others.
    """
    import onnx

    model = onnx.ModelProto.FromString(_folded(graph))
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes: list[Any] = []
    for node in model.graph.node:
        weight = weights.get(node.input[1]) if node.op_type in ("Gemm", "MatMul") else None
        if weight is None or len(weight.dims) != 2:
            nodes.append(node)
            continue
        matrix_DV, how = onnx.numpy_helper.to_array(weight), _attributes(node)
        if (how["alpha"], how["beta"], how["transA"]) != (1.0, 1.0, 0):
            raise ValueError(f"A product of this kind is not known: {node.name} {how}")
        matrix_DV = matrix_DV.T if how["transB"] else matrix_DV
        nodes += _product(model.graph, node, matrix_DV, levels)
        model.graph.initializer.remove(weight)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.opset_import.append(onnx.helper.make_opsetid(_MICROSOFT, 1))
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def _product(graph: Any, node: Any, matrix_DV: np.ndarray, levels: int) -> list[Any]:
    """Return the nodes of ``x @ matrix + bias``, with ``x`` in units of its rows; their constants go into the graph.

    The product's own bias is not used: it would be multiplied with the rows' scales.
    """
    from onnx import helper, numpy_helper

    scale_V = np.maximum(np.abs(matrix_DV).max(0) / levels, np.finfo(np.float32).tiny).astype(np.float32)
    constants = {
        "weight": np.rint(matrix_DV / scale_V).astype(np.int8),
        "scale": scale_V,
        "last": np.array([-1], np.int64),
        "share": np.float32(1 / STATE_LEVELS),
        "least": np.finfo(np.float32).tiny,
        "one": np.float32(1),
        "zero": np.uint8(128),
    }
    for name, array in constants.items():
        graph.initializer.append(numpy_helper.from_array(np.asarray(array, order="C"), f"{node.name}.{name}"))

    def own(name: str) -> str:
        return f"{node.name}.{name}"

    def step(kind: str, inputs: list[str], output: str, **more: Any) -> Any:
        return helper.make_node(kind, inputs, [output], own(f"{kind}.{len(steps)}"), **more)

    bias, out = list(node.input[2:]), node.output[0]
    steps: list[Any] = []
    steps.append(step("Abs", [node.input[0]], own("sizes")))
    steps.append(step("ReduceMax", [own("sizes"), own("last")], own("largest"), keepdims=1))
    steps.append(step("Mul", [own("largest"), own("share")], own("shares")))
    steps.append(step("Max", [own("shares"), own("least")], own("unit")))
    steps.append(step("Div", [node.input[0], own("unit")], own("in_units")))
    steps.append(step("QuantizeLinear", [own("in_units"), own("one"), own("zero")], own("rounded")))
    names = [own(name) for name in ("rounded", "weight", "one", "scale", "zero")]
    steps.append(step("MatMulIntegerToFloat", names, own("product"), domain=_MICROSOFT))
    steps.append(step("Mul", [own("product"), own("unit")], own("scaled") if bias else out))
    return [*steps, step("Add", [own("scaled"), bias[0]], out)] if bias else steps


def _attributes(node: Any) -> dict[str, Any]:
    from onnx import helper

    given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    return {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0} | given


def _folded(graph: bytes) -> bytes:
    """Return the graph with its constants computed: transposed weights are constants then, and can be rounded."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder, "folded.onnx"))
        onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        return Path(options.optimized_model_filepath).read_bytes()
