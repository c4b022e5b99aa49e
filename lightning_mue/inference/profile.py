"""Measuring the latency table of a model on this device, at batch 1, with the executor that serves."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import nn

from lightning_mue.backbones import Backbone, view
from lightning_mue.exits import Exits, attached
from lightning_mue.inference.encode import encode, stream_scores
from lightning_mue.inference.record import DECODER_SIGNALS, STREAM_SIGNALS
from lightning_mue.inference.stopwatch import Stopwatch
from lightning_mue.inference.torch_executor import TorchExecutor
from lightning_mue.latency import DecoderLatency, LatencyTable, StreamLatency

BLOCK_SIZES = (1, 2, 4, 8, 16)


@torch.inference_mode()
def measure_latency(
    model: nn.Module, inputs: dict[str, Any], repeats: int = 30, max_new_tokens: int | None = None
) -> LatencyTable:
    """Return what each piece costs: medians over interleaved repeats, after a warm-up.

    Args:
        model: a backbone with exits.
        inputs: of one sample (batch 1).
        repeats: of each piece.
        max_new_tokens: sizes the buffers as in serving.
    """
    model.eval()
    backbone, exits = view(model), attached(model)
    inputs = {name: inputs[name] for name in backbone.generate_inputs if inputs.get(name) is not None}
    pieces = _stream_pieces(backbone, exits, inputs) | _decoder_pieces(backbone, exits, inputs, max_new_tokens)
    ms = _time(pieces, repeats, next(model.parameters()).device)
    streams = {}
    for stream in backbone.encoders:
        signals = {s: ms[f"{stream.name}.{s}"] for s in STREAM_SIGNALS if f"{stream.name}.{s}" in ms}
        fixed = ms[f"{stream.name}.prologue"] + ms[f"{stream.name}.epilogue"]
        streams[stream.name] = StreamLatency(fixed, ms[f"{stream.name}.layer"], signals)
    sizes = tuple(m for m in BLOCK_SIZES if f"decoder.layer{m}" in ms)
    decoder = DecoderLatency(
        sizes,
        tuple(ms[f"decoder.layer{m}"] for m in sizes),
        ms["decoder.memory"],
        ms["decoder.embed"] + ms["decoder.head"],
        {s: ms[f"decoder.{s}"] for s in DECODER_SIGNALS if f"decoder.{s}" in ms},
    )
    return LatencyTable(streams, decoder, device_name(next(model.parameters()).device), torch.get_num_threads())


def device_name(device: torch.device) -> str:
    """Return what the device is called, without the name of the host."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU"


def _stream_pieces(
    backbone: Backbone, exits: Exits | None, inputs: dict[str, Any]
) -> dict[str, Callable[[], object]]:
    pieces: dict[str, Callable[[], object]] = {}
    before = None
    for stream in backbone.encoders:
        state = stream.prologue(inputs, before)
        name, middle, first = stream.name, (stream.num_layers + 1) // 2, state.h_BTD
        pieces[f"{name}.prologue"] = lambda stream=stream, before=before: stream.prologue(inputs, before)
        pieces[f"{name}.layer"] = lambda stream=stream, state=state, k=middle: stream.layer(k, state)
        pieces[f"{name}.epilogue"] = lambda stream=stream, h=first: stream.epilogue(h)
        layers = exits.layers.get(name, ()) if exits is not None else ()
        for signal in STREAM_SIGNALS if layers else ():
            if signal != "gate" or (exits is not None and exits.config.gate):
                pieces[f"{name}.{signal}"] = lambda signal=signal, name=name, k=layers[0], state=state, h=first: bool(
                    (stream_scores(exits, signal, name, k, state, h) >= 0.5).any()
                )
        for k in range(1, stream.num_layers + 1):
            state.h_BTD = stream.layer(k, state)
        before = stream.epilogue(state.h_BTD)
    return pieces


def _decoder_pieces(
    backbone: Backbone, exits: Exits | None, inputs: dict[str, Any], max_new_tokens: int | None
) -> dict[str, Callable[[], object]]:
    settings = backbone.decode_settings(max_new_tokens)
    silent = Stopwatch(torch.device("cpu"), False)
    memory_BSD = encode(backbone, exits, inputs, {}, silent).memory_BSD
    steps = settings.max_new_tokens
    processors = backbone.token_processors(settings, None)
    executor = TorchExecutor(backbone, exits, memory_BSD, backbone.memory_mask(inputs), steps, processors, silent)
    for position in range(steps):
        executor.embed([0], position, [settings.start_id])
    for layer in range(1, executor.num_layers + 1):
        executor.run_layer(layer, [0], 0, steps)
    at, layer = steps - 1, (executor.num_layers + 1) // 2
    pieces: dict[str, Callable[[], object]] = {
        "decoder.embed": lambda: executor.embed([0], at, [settings.start_id]),
        "decoder.head": lambda: executor.choose({executor.num_layers: [0]}, at),
        "decoder.memory": lambda: backbone.decoder.memory_kv(layer, memory_BSD),
    }
    for m in BLOCK_SIZES:
        if m <= steps:
            first = max(0, at + 1 - m)
            pieces[f"decoder.layer{m}"] = lambda m=m, first=first: executor.run_layer(layer, [0], first, first + m)
    exit_layers = exits.layers.get("decoder", ()) if exits is not None else ()
    for signal in DECODER_SIGNALS if exit_layers else ():
        if signal != "gate" or (exits is not None and exits.config.gate):
            pieces[f"decoder.{signal}"] = lambda signal=signal, k=exit_layers[0]: executor.score(signal, k, [0], at)
    return pieces


def _time(pieces: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, float]:
    """Return name -> median milliseconds; pieces take turns, so that drift of the machine hits all alike."""
    samples: dict[str, list[float]] = {name: [] for name in pieces}
    for turn in range(repeats + 3):
        for name, piece in pieces.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            begin = time.perf_counter()
            piece()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn >= 3:
                samples[name].append((time.perf_counter() - begin) * 1e3)
    return {name: median(values) for name, values in samples.items()}
