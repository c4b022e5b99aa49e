"""Graphs that run, and what a decoder's executor needs of them. Arrays alone; no torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from lightning_mue.inference.buffers import Buffers
from lightning_mue.inference.screened_head import ScreenedHead
from lightning_mue.inference.session_options import session_options
from lightning_mue.inference.small_head import MOST_WEIGHTS, SmallHead

Array = np.ndarray
Head = Callable[[Array], Array]
"""Normed states ``[R, D]`` -> logits ``[R, V]``."""


class Session:
    """A graph that runs: arrays in the order of its inputs -> arrays in the order of its outputs.

    Args:
        graph: its bytes.
        threads: of one call.
        weights: by name, where the graph has places for them and not the numbers.
    """

    def __init__(self, graph: bytes, threads: int, weights: Mapping[str, Array] | None = None) -> None:
        import onnxruntime

        options = session_options(threads)
        self._weights = dict(weights or {})
        if self._weights:
            given = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in self._weights.values()]
            options.add_external_initializers([*self._weights], given)
        self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self.shapes = {given.name: given.shape for given in self._session.get_inputs()}
        self.outputs = [given.name for given in self._session.get_outputs()]

    def __call__(self, *arrays: Array) -> Sequence[Array]:
        """Run."""
        found: Sequence[Array] = self._session.run(None, dict(zip(self.shapes, arrays, strict=True)))
        return found

    def into(self, arrays: Sequence[Array], outputs: Sequence[Array]) -> None:
        """Run, and write the outputs where these contiguous arrays are: nothing is copied."""
        from onnxruntime import OrtValue

        binding = self._session.io_binding()
        for name, array in zip(self.shapes, arrays, strict=True):
            binding.bind_ortvalue_input(name, OrtValue.ortvalue_from_numpy(array))
        for name, array in zip(self.outputs, outputs, strict=True):
            binding.bind_ortvalue_output(name, OrtValue.ortvalue_from_numpy(array))
        self._session.run_with_iobinding(binding)

    def named(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Run on those of the arrays that it takes; return its outputs by name."""
        return dict(zip(self.outputs, self(*(arrays[name] for name in self.shapes)), strict=True))


LAYER_PIECES = ("before", "between", "after", "memory")
"""What a layer is cut into; one without cross-attention has the first and the third."""


@dataclass(frozen=True)
class LayerSessions:
    """One layer's `LayerPieces`, running."""

    before: Session
    between: Session | None
    after: Session
    memory: Session | None
    window: int | None = None

    def project(self, h_ND: Array, positions_N: Array) -> Sequence[Array]:
        """Return query, key and value of states at these positions."""
        return self.before(h_ND, positions_N[:, None]) if len(self.before.shapes) == 2 else self.before(h_ND)

    @classmethod
    def of(cls, make: Callable[[str], Session | None], window: int | None = None) -> LayerSessions:
        """Return the sessions that ``make`` gives by name; None for a piece that the layer does not have."""
        before, between, after, memory = map(make, LAYER_PIECES)
        assert before is not None
        assert after is not None
        return cls(before, between, after, memory, window)


@dataclass(frozen=True, eq=False)
class DecoderSessions:
    """All layers of a decoder and its head.

    Args:
        layers: first to last.
        heads: of keys and values.
        head_dim: of each.
        max_positions: at most.
        precision: of the layers' weights.
        threads: of one call.
        weight_VD: the head's matrix.
        bias_V: the head's bias, or None.
        make_head: makes what gives all logits, which only some signals need.
        product: the graph of the screened head's product; made if not given.
        buffers: of the states and K/V of decodes.
        distance_bias_HN: is added to self-attention's scores of the position ``n`` back, beyond its end the last; None:
            nothing is.
        gates: exit layer -> module and graph of its gate, once it has been asked.
    """

    layers: Sequence[LayerSessions]
    heads: int
    head_dim: int
    max_positions: int
    precision: str
    threads: int
    weight_VD: Array
    bias_V: Array | None
    make_head: Callable[[], Head]
    product: bytes | None = None
    distance_bias_HN: Array | None = None
    buffers: Buffers = field(default_factory=Buffers)
    gates: dict[int, tuple[Any, Session]] = field(default_factory=dict)

    def back(self, positions: int, window: int | None) -> Array | None:
        """Return what is added to the score of the position so many back, ``[H, positions]``, or None."""
        at_T, bias_HN = np.arange(positions), self.distance_bias_HN
        if bias_HN is None and (window is None or positions <= window):
            return None
        back_HT = (
            np.zeros((self.heads, positions), np.float32)
            if bias_HN is None
            else bias_HN[:, at_T.clip(max=bias_HN.shape[1] - 1)]
        )
        return back_HT if window is None else np.where(at_T < window, back_HT, np.finfo(np.float32).min)

    @cached_property
    def head(self) -> Head:
        """All logits."""
        return self.make_head()

    @cached_property
    def greedy_head(self) -> ScreenedHead | SmallHead:
        """The best tokens, exactly; where there are many, from weights of 8 bits."""
        if self.weight_VD.size <= MOST_WEIGHTS:
            return SmallHead(self.weight_VD, self.bias_V)
        return ScreenedHead(self.weight_VD, self.bias_V, self.threads, self.product)

    def closed_head(self, tokens: Sequence[int]) -> Head:
        """Return a head for these tokens: it scores their rows alone, in float32, and bars all others."""
        weight_VD, vocabulary = self.weight_VD[list(tokens)], len(self.weight_VD)
        bias_V = None if self.bias_V is None else self.bias_V[list(tokens)]

        def head(h_RD: Array) -> Array:
            logits_RV = np.full((len(h_RD), vocabulary), -np.inf, np.float32)
            logits_RV[:, list(tokens)] = h_RD @ weight_VD.T + (0 if bias_V is None else bias_V)
            return logits_RV

        return head
