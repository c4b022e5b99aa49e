"""The graph of the screened head's product: without its weights, which a session is given beside it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import TensorProto, helper, numpy_helper


def product_graph(vocabulary: int, width: int) -> bytes:
    """Return ``scale * ((states - 128) @ weight) + sizes @ norms`` as a graph.

    States are uint8 with zero point 128, the form with the fastest kernels. ``weight [D, V]``, ``scale [V]`` and
    ``norms [2, V]`` are external: whoever makes a session of it adds them.
    """
    numbers: dict[str, np.ndarray] = {"one": np.array(1, np.float32), "zero": np.array(128, np.uint8)}
    scalars = [numpy_helper.from_array(number, name) for name, number in numbers.items()]
    tensors = [
        _external("weight", TensorProto.INT8, (width, vocabulary)),
        _external("scale", TensorProto.FLOAT, (vocabulary,)),
        _external("norms", TensorProto.FLOAT, (2, vocabulary)),
    ]
    info = helper.make_tensor_value_info
    inputs = [info("states", TensorProto.UINT8, ["R", width]), info("sizes", TensorProto.FLOAT, [2])]
    output = info("out", TensorProto.FLOAT, ["R", vocabulary])
    error = helper.make_node("MatMul", ["sizes", "norms"], ["error"])
    names = ["states", "weight", "one", "scale", "zero", "", "error"]
    product = helper.make_node("MatMulIntegerToFloat", names, ["out"], domain="com.microsoft")
    graph = helper.make_graph([error, product], "screen", inputs, [output], [*tensors, *scalars])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    data: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString(deterministic=True)
    return data


def _external(name: str, kind: int, shape: Sequence[int]) -> TensorProto:
    tensor = TensorProto(name=name, data_type=kind, dims=shape)
    make_external(tensor)
    return tensor


def make_external(tensor: TensorProto) -> None:
    """Take the numbers out of a tensor; nothing is read from where it says they are."""
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="given")
