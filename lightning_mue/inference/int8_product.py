"""Int8Product: float32 results from integers of 8 bits, on ONNX Runtime; and how large those may be. No torch here.

Shapes: ``R`` rows, ``D`` width, ``V`` outputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lightning_mue.inference.session_options import session_options

if TYPE_CHECKING:
    import onnxruntime as ort

WEIGHT_LEVELS = (127, 63)
"""Largest integer weight, tried in turn: x86 without VNNI adds two products in 16 bits, which 63 cannot overflow."""

STATE_LEVELS = 127

PROBE = (48, 64)
"""Outputs and width of a small product, with which a machine is asked how it multiplies."""


class Int8Product:
    """``scale * (p @ weight) + sizes @ norms``: 8-bit states ``p``, int8 weights, all else float32; on ONNX Runtime."""

    def __init__(
        self, weight_VD: np.ndarray, scale_V: np.ndarray, norms_2V: np.ndarray, threads: int, graph: bytes
    ) -> None:
        import onnxruntime as ort

        options = session_options(threads)
        self._value = ort.OrtValue.ortvalue_from_numpy
        self._weights = {"weight": np.ascontiguousarray(weight_VD.T), "scale": scale_V, "norms": norms_2V}
        given = [self._value(array) for array in self._weights.values()]
        options.add_external_initializers([*self._weights], given)
        self._session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self._sizes_2 = np.zeros(2, np.float32)
        self._states_RD = np.zeros((0, weight_VD.shape[1]), np.uint8)
        self._out_RV = np.zeros((0, len(weight_VD)), np.float32)
        self._bindings: dict[int, ort.IOBinding] = {}

    def __call__(self, p_RD: np.ndarray, sizes_2: np.ndarray) -> np.ndarray:
        """Return ``[R, V]`` for integers within -128..127, in a buffer that the next call overwrites."""
        rows = len(p_RD)
        if rows > len(self._out_RV):
            self._bindings.clear()
            self._states_RD = np.empty((rows, self._states_RD.shape[1]), np.uint8)
            self._out_RV = np.empty((rows, self._out_RV.shape[1]), np.float32)
        binding = self._bindings.get(rows) or self._bind(rows)
        np.add(p_RD, 128, out=self._states_RD[:rows], casting="unsafe")
        self._sizes_2[:] = sizes_2
        self._session.run_with_iobinding(binding)
        return self._out_RV[:rows]

    def _bind(self, rows: int) -> ort.IOBinding:
        """Return the graph bound to the buffers' first rows; a binding keeps no buffer alive, this object does."""
        binding = self._bindings[rows] = self._session.io_binding()
        for name, array in (("states", self._states_RD[:rows]), ("sizes", self._sizes_2)):
            binding.bind_ortvalue_input(name, self._value(array))
        binding.bind_ortvalue_output("out", self._value(self._out_RV[:rows]))
        return binding


def largest_weight(graph: bytes, vocabulary: int, width: int) -> int | None:
    """Return which of ``WEIGHT_LEVELS`` this machine multiplies exactly; None: not even the smallest.

    Args:
        graph: of ``product_graph`` for these sizes.
        vocabulary: outputs.
        width: of what is multiplied.
    """
    return next((levels for levels in WEIGHT_LEVELS if _is_exact(levels, vocabulary, width, graph)), None)


def _is_exact(levels: int, vocabulary: int, width: int, graph: bytes) -> bool:
    """Return whether the product is that of integers at its extremes, for one row and for many."""
    rng = np.random.default_rng(0)
    weight_VD = levels * rng.choice(np.array([-1, 1], np.int8), (48, width))
    weight_VD[0] = levels
    weight_VD = np.resize(weight_VD, (vocabulary, width))
    states_RD = STATE_LEVELS * rng.choice([-1, 1], (9, width))
    states_RD[0] = STATE_LEVELS
    scale_V, norms_2V = np.ones(vocabulary, np.float32), np.zeros((2, vocabulary), np.float32)
    product = Int8Product(weight_VD, scale_V, norms_2V, 1, graph)
    expected_RV = (states_RD @ weight_VD[:48].T.astype(np.int64)).astype(np.float32)
    expected_RV = expected_RV[:, np.arange(vocabulary) % 48]
    return all(np.array_equal(product(states_RD[:rows], np.zeros(2)), expected_RV[:rows]) for rows in (1, 9))
