"""A backbone's layers as ONNX Runtime sessions: made once, used by every decode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import nn

from lightning_mue.backbones import Backbone, DecoderStream, EncoderStream, StreamState, fingerprint
from lightning_mue.backbones.stream import TokenProcessor
from lightning_mue.exits import Exits
from lightning_mue.inference.graphs import Graphs
from lightning_mue.inference.ort_executor import OrtExecutor, Processor
from lightning_mue.inference.outside import Outside
from lightning_mue.inference.sampling import Sampling
from lightning_mue.inference.session import DecoderSessions, Head, LayerSessions, Session
from lightning_mue.inference.stopwatch import Stopwatch


def decoder_sessions(decoder: DecoderStream, precision: str = "float32") -> DecoderSessions:
    """Return all layers of a decoder and its head, running.

    Args:
        decoder: whose pieces they are; its weights are copied, in the precision asked for.
        precision: one of ``graphs.PRECISIONS``.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is not installed.
    """
    check_installed()
    graphs, threads = Graphs(precision), torch.get_num_threads()
    pieces = decoder_pieces(decoder)

    def session(name: str) -> Session:
        with torch.inference_mode(False):
            return Session(graphs.make(*pieces[name]), threads)

    def head() -> Head:
        run = session("head")
        return lambda h_RD: run(h_RD)[0]

    def piece(k: int, name: str) -> Session | None:
        return session(at) if (at := f"{k}/{name}") in pieces else None

    layers = [LayerSessions.of(partial(piece, k), decoder.window(k)) for k in range(1, decoder.num_layers + 1)]
    shape = (decoder.num_kv_heads, decoder.head_dim, decoder.max_positions)
    bias, weights = decoder.distance_bias(), decoder.head_weights()
    bias_HN = None if bias is None else bias.detach().float().numpy()
    return DecoderSessions(layers, *shape, precision, threads, *weights, head, distance_bias_HN=bias_HN)


def decoder_pieces(decoder: DecoderStream) -> dict[str, tuple[nn.Module, *tuple[torch.Tensor, ...]]]:
    """Return name -> module and examples of what it is given, of the head and of all layers' pieces."""
    h_ND, memory_BSD = torch.zeros(2, decoder.width), torch.zeros(2, 3, decoder.memory_width)
    read_ND = torch.zeros(2, decoder.num_heads * decoder.head_dim)
    examples: dict[str, Any] = {
        "before": (h_ND,),
        "between": (h_ND, read_ND),
        "after": (h_ND, read_ND),
        "memory": (memory_BSD,),
    }
    cut = {k: decoder.pieces(k) for k in range(1, decoder.num_layers + 1)}
    if cut[1].reads_positions:
        examples["before"] = (h_ND, torch.zeros(2, 1, dtype=torch.long))
    layers = {k: pieces.named() for k, pieces in cut.items()}
    found: dict[str, Any] = {"head": (decoder.head_piece, h_ND)}
    return found | {f"{k}/{name}": (part[name], *examples[name]) for k, part in layers.items() for name in part}


class TorchOutside(Outside):
    """What of a decoder lies outside its layers and its head, in torch; gates as graphs, for they are asked often.

    Args:
        sessions: the decoder's; they keep the gates.
        decoder: the backbone's.
        exits: the backbone's, or None.
    """

    def __init__(self, sessions: DecoderSessions, decoder: DecoderStream, exits: Exits | None) -> None:
        super().__init__(sessions, None if exits is None or exits.shortlist is None else exits.shortlist.tolist())
        self._decoder, self._exits = decoder, exits

    def embed(self, ids_Rm: np.ndarray, first: int) -> np.ndarray:
        """Return the states that enter layer 1."""
        return self._decoder.embed(torch.from_numpy(ids_Rm), first).numpy()

    def branch(self, layer: int, h_RD: np.ndarray) -> np.ndarray:
        """Return what the head reads of an exit's states."""
        h = torch.from_numpy(h_RD)
        return self._decoder.norm(h if self._exits is None else self._exits.adapt("decoder", layer, h)).numpy()

    def gate_session(self, layer: int) -> Session:
        """Return an exit's gate."""
        assert self._exits is not None
        gate, kept = self._exits.gates[f"decoder_{layer}"], self._sessions.gates
        if layer not in kept or kept[layer][0] is not gate:
            beside = () if self._exits.shortlist is None else (torch.zeros(2, 2),)
            with torch.inference_mode(False):
                graph = Graphs().make(gate, torch.zeros(2, self._decoder.width), *beside)
            kept[layer] = gate, Session(graph, self._sessions.threads)
        return kept[layer][1]


def make_executor(
    sessions: DecoderSessions,
    backbone: Backbone,
    exits: Exits | None,
    memory_BSD: torch.Tensor,
    memory_mask: torch.Tensor | None,
    positions: int,
    processors: Sequence[TokenProcessor],
    stopwatch: Stopwatch,
    beams: int = 1,
    closed: Sequence[int] | None = None,
    sampling: Sampling | None = None,
) -> OrtExecutor:
    """Return the executor of a batch whose tensors lie in float32 on the CPU; called as `TorchExecutor` is."""
    bias_BS = None if memory_mask is None else np.ascontiguousarray(memory_mask[:, 0, 0].numpy())
    how = (bias_BS, positions, [_of_arrays(processor) for processor in processors], stopwatch)
    outside = TorchOutside(sessions, backbone.decoder, exits)
    return OrtExecutor(sessions, outside, np.ascontiguousarray(memory_BSD.numpy()), *how, beams, closed, sampling)


def _of_arrays(processor: TokenProcessor) -> Processor:
    """Return a processor of tensors as one of arrays."""

    def process(ids_Rt: np.ndarray, logits_RV: np.ndarray, rows: Sequence[int]) -> np.ndarray:
        return processor(torch.from_numpy(ids_Rt), torch.from_numpy(logits_RV), rows).numpy()

    return process


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
        found = _SHARED[key] = Sessions(streams, decoder_sessions(backbone.decoder, precision))
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
