"""What the pieces of a backbone take, counted while each of them runs once: numbers in its matrices, multiply-adds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lightning_mue.backbones import Backbone, DecoderStream, EncoderStream, view
from lightning_mue.backbones.stream import Inputs, causal_mask
from lightning_mue.benchmark.limits import DecoderWork, StreamWork, Work


@dataclass(frozen=True)
class ModelWork:
    """A backbone's pieces on inputs of one size."""

    streams: Mapping[str, StreamWork]
    decoder: DecoderWork


def model_work(model: nn.Module, inputs: Mapping[str, Any]) -> ModelWork:
    """Count the pieces of a backbone, which run once each, on a batch of inputs.

    What makes the memory of the streams' outputs is counted with the last stream.
    """
    backbone = view(model)
    done: dict[str, Tensor] = {}
    streams = {stream.name: _stream_work(backbone, stream, inputs, done) for stream in backbone.encoders}
    memory_BSD, joining = counted(model, partial(backbone.memory, done))
    name, last = streams.popitem()
    streams[name] = StreamWork(_both(last.fixed, joining), last.layers)
    return ModelWork(streams, decoder_work(model, backbone.decoder, memory_BSD[:1]))


def decoder_work(model: nn.Module, decoder: DecoderStream, memory_1SD: Tensor) -> DecoderWork:
    """Count the pieces of a decoder that reads this memory."""
    h_11D = memory_1SD.new_zeros(1, 1, decoder.width)
    mask = causal_mask(0, 1, h_11D.dtype, h_11D.device, decoder.distance_bias())
    layers, memory = [], []
    for k in range(1, decoder.num_layers + 1):
        _, whole = counted(model, partial(decoder.layer, k, h_11D, memory_1SD, mask, None))
        if not decoder.reads_memory(k):
            memory.append(Work(0, 0))
            layers.append(whole)
            continue
        (key, value), projection = counted(model, partial(decoder.memory_kv, k, memory_1SD))
        memory.append(projection)
        layers.append(
            Work(whole.weights - projection.weights, whole.macs - projection.macs, key.numel() + value.numel())
        )
    _, head = counted(model, lambda: decoder.head(decoder.norm(h_11D[0])))
    return DecoderWork(layers, memory, head)


def _stream_work(backbone: Backbone, stream: EncoderStream, inputs: Inputs, done: dict[str, Tensor]) -> StreamWork:
    """Count a stream, and add what it gives to ``done``."""
    state, first = counted(backbone.model, partial(stream.prologue, inputs, done))
    layers = []
    for k in range(1, stream.num_layers + 1):
        state.h_BTD, layer = counted(backbone.model, partial(stream.layer, k, state))
        layers.append(layer)
    done[stream.name], last = counted(backbone.model, partial(stream.epilogue, state))
    return StreamWork(_both(first, last), layers)


def _both(one: Work, other: Work) -> Work:
    return Work(one.weights + other.weights, one.macs + other.macs)


def counted(model: nn.Module, piece: Callable[[], Any]) -> tuple[Any, Work]:
    """Run a piece of a model; return what it gives and what it took."""
    # Some products reach a dispatch mode as one with what is around them: those of inference mode, and of torch's own
    # fused attention modules.
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.inference_mode(False), torch.no_grad(), _Counter(model) as counter:
            result = piece()
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return result, counter.work


class _Counter(TorchDispatchMode):
    """Counts products, and the parameters that are factors in them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._known = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._read: set[tuple[int, int, int]] = set()
        self._macs = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self._macs += count(*args, **(kwargs or {}), out_val=result) // 2
            tensors = [
                (a.untyped_storage().data_ptr(), int(a.storage_offset()), a.numel())
                for a in args
                if isinstance(a, Tensor)
            ]
            self._read |= {part for part in tensors if part[0] in self._known}  # some matrices are parts of one
        return result

    @property
    def work(self) -> Work:
        """What was counted."""
        return Work(sum(size for _, _, size in self._read), self._macs)
