"""A backbone's layers as ONNX Runtime sessions: made once, used by every decode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch

from lightning_mue.backbones import Backbone, DecoderStream, EncoderStream, StreamState, fingerprint
from lightning_mue.inference.graphs import Graphs
from lightning_mue.inference.screened_head import Process, ScreenedHead


class Session:
    """A graph that runs: arrays in the order of its inputs -> arrays in the order of its outputs.

    Args:
        graph: its bytes.
        threads: of one call.
    """

    def __init__(self, graph: bytes, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self._names = [given.name for given in self._session.get_inputs()]

    def __call__(self, *arrays: np.ndarray) -> Sequence[np.ndarray]:
        """Run."""
        found: Sequence[np.ndarray] = self._session.run(None, dict(zip(self._names, arrays, strict=True)))
        return found


@dataclass(frozen=True)
class LayerSessions:
    """One layer's `LayerPieces`, running."""

    before: Session
    between: Session
    after: Session
    memory: Session


class DecoderSessions:
    """All layers of a decoder and its head.

    Args:
        decoder: whose pieces they are; its weights are copied, in the precision asked for.
        precision: one of ``graphs.PRECISIONS``.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is not installed.
    """

    def __init__(self, decoder: DecoderStream, precision: str = "float32") -> None:
        check_installed()
        self.precision, self.threads = precision, torch.get_num_threads()
        graphs = Graphs(precision)
        h_ND, memory_BSD = torch.zeros(2, decoder.width), torch.zeros(2, 3, decoder.width)
        examples = {"before": (h_ND,), "between": (h_ND, h_ND), "after": (h_ND, h_ND), "memory": (memory_BSD,)}

        def session(module: Any, *given: torch.Tensor) -> Session:
            return Session(graphs.make(module, *given), self.threads)

        with torch.inference_mode(False):
            self.layers = [
                LayerSessions(**{n: session(piece, *examples[n]) for n, piece in decoder.pieces(k).named().items()})
                for k in range(1, decoder.num_layers + 1)
            ]
        weight_VD, bias_V = decoder.head_weights()
        self.screened_head = ScreenedHead(weight_VD, bias_V, self.threads)
        self._make_head = partial(session, decoder.head_piece, h_ND)

    @cached_property
    def head(self) -> Session:
        """All logits, which only some signals need."""
        with torch.inference_mode(False):
            return self._make_head()

    def best(self, h_RD: np.ndarray, process: Process | None) -> np.ndarray:
        """Return the best token of each row of normed states, exactly, from weights of 8 bits."""
        return self.screened_head.argmax(h_RD, process)


class StreamSessions:
    """A stream before the decoder whose layers run as graphs; prologue and epilogue are the backbone's.

    A layer becomes a session when it is first reached, once for each number of inputs and size of picture.

    Args:
        stream: the backbone's.
        precision: one of ``graphs.PRECISIONS``.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is not installed.
    """

    def __init__(self, stream: EncoderStream, precision: str = "float32") -> None:
        check_installed()
        self.name, self.num_layers, self.width = stream.name, stream.num_layers, stream.width
        self.prologue, self.epilogue, self.call = stream.prologue, stream.epilogue, stream.call
        self._graphs, self._threads = Graphs(precision), torch.get_num_threads()
        self._sessions: dict[Any, Session] = {}

    def layer(self, k: int, state: StreamState) -> torch.Tensor:
        """Run layer ``k``."""
        call = self.call(k, state)
        key = (k, len(call.tensors), state.grid)
        if key not in self._sessions:
            with torch.inference_mode(False):
                examples = [torch.zeros(tensor.shape) for tensor in call.tensors]
                graph = self._graphs.make(call.module, *examples, free=call.free)
            self._sessions[key] = Session(graph, self._threads)
        (h_BTD,) = self._sessions[key](*(tensor.contiguous().numpy() for tensor in call.tensors))
        return torch.from_numpy(h_BTD)


@dataclass(frozen=True, eq=False)
class Sessions:
    """Everything of a backbone that runs in ONNX Runtime."""

    streams: tuple[StreamSessions, ...]
    decoder: DecoderSessions


_SHARED: WeakValueDictionary[tuple[str, str, int, int], Sessions] = WeakValueDictionary()


def shared_sessions(backbone: Backbone, precision: str = "float32") -> Sessions:
    """Return the sessions of these weights, those of another engine if there are any: they are held once.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is not installed.
    """
    where = backbone.decoder.head_weights()[0].ctypes.data  # the head is not copied: another model's may change
    key = (fingerprint(backbone.model), precision, torch.get_num_threads(), where)
    if (found := _SHARED.get(key)) is None:
        streams = tuple(StreamSessions(stream, precision) for stream in backbone.encoders)
        found = _SHARED[key] = Sessions(streams, DecoderSessions(backbone.decoder, precision))
    return found


def check_installed() -> None:
    """Refuse to go on without the libraries of this runtime.

    Raises:
        ImportError: which one is missing, and what to install.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript
    except ImportError as error:
        raise ImportError(
            f"The ONNX Runtime executor needs onnx, onnxscript and onnxruntime ({error}): "
            'pip install "lightning-mue[ort]", or take runtime="torch"'
        ) from error
    del onnx, onnxruntime, onnxscript
