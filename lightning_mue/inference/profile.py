"""Measuring the latency table of a model on this device, at batch 1, with the executor that serves."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mue.backbones import Backbone, EncoderStream, StreamState, view
from lightning_mue.backbones.prompt import read_prompts
from lightning_mue.exits import Exits, attached
from lightning_mue.inference.encode import encode, stream_scores
from lightning_mue.inference.record import DECODER_SIGNALS, STREAM_SIGNALS
from lightning_mue.inference.runtime import Runtime, torch_runtime
from lightning_mue.inference.stopwatch import Stopwatch
from lightning_mue.latency import DecoderLatency, LatencyTable, StreamLatency
from lightning_mue.signals import NEEDS_LOGITS

BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64)

Pieces = dict[str, Callable[[], object]]


@torch.inference_mode()
def measure_latency(
    model: nn.Module,
    inputs: dict[str, Any],
    repeats: int = 30,
    max_new_tokens: int | None = None,
    runtime: Runtime | None = None,
) -> LatencyTable:
    """Return what each piece costs: medians over interleaved repeats, after a warm-up.

    Args:
        model: a backbone with exits.
        inputs: of one sample (batch 1).
        repeats: of each piece.
        max_new_tokens: sizes the buffers as in serving.
        runtime: what runs the layers; the backbone's own modules if not given.
    """
    model.eval()
    backbone, exits = view(model), attached(model)
    inputs = {name: inputs[name] for name in backbone.generate_inputs if inputs.get(name) is not None}
    runtime = runtime or torch_runtime(backbone)
    pieces = _stream_pieces(runtime.streams, exits, inputs)
    pieces |= _decoder_pieces(backbone, runtime, exits, inputs, max_new_tokens)
    ms = _time(pieces, repeats, next(model.parameters()).device)
    streams = {}
    for stream in backbone.encoders:
        signals = {s: ms[f"{stream.name}.{s}"] for s in STREAM_SIGNALS if f"{stream.name}.{s}" in ms}
        fixed = ms[f"{stream.name}.prologue"] + ms[f"{stream.name}.epilogue"]
        adapter = ms.get(f"{stream.name}.adapter", 0.0)
        streams[stream.name] = StreamLatency(fixed, ms[f"{stream.name}.layer"], signals, adapter)
    sizes = tuple(m for m in BLOCK_SIZES if f"decoder.layer{m}" in ms)
    decoder = DecoderLatency(
        sizes,
        tuple(ms[f"decoder.layer{m}"] for m in sizes),
        ms["decoder.memory"],
        ms["decoder.embed"] + ms["decoder.head"],
        {s: ms[f"decoder.{s}"] for s in DECODER_SIGNALS if f"decoder.{s}" in ms},
        _exit_ms(ms),
    )
    return LatencyTable(streams, decoder, device_name(next(model.parameters()).device), torch.get_num_threads())


def _exit_ms(ms: dict[str, float]) -> dict[str, float]:
    """Return signal -> what leaving the decoder early adds to a step that has paid for the signal and a head."""
    if "decoder.exit" not in ms:
        return {}
    adapter = ms["decoder.exit"] - ms["decoder.head"]
    return {s: -ms["decoder.head"] if s in NEEDS_LOGITS else adapter for s in (*DECODER_SIGNALS, "static")}


def device_name(device: torch.device) -> str:
    """Return what the device is called, without the name of the host."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU"


def _stream_pieces(streams: Sequence[EncoderStream], exits: Exits | None, inputs: dict[str, Any]) -> Pieces:
    pieces: Pieces = {}
    done: dict[str, Tensor] = {}
    for stream in streams:
        state = stream.prologue(inputs, done)
        name, first = stream.name, state.h_BTD
        pieces[f"{name}.prologue"] = partial(stream.prologue, inputs, dict(done))
        pieces[f"{name}.layer"] = partial(stream.layer, (stream.num_layers + 1) // 2, replace(state))
        pieces[f"{name}.epilogue"] = partial(stream.epilogue, replace(state))
        for signal in _signals(exits, name, STREAM_SIGNALS):
            k = exits.layers[name][0] if exits is not None else 0
            pieces[f"{name}.{signal}"] = partial(_decide, exits, signal, name, k, replace(state), first)
        if exits is not None and name in exits.layers:
            pieces[f"{name}.adapter"] = partial(exits.adapt, name, exits.layers[name][0], first)
        for k in range(1, stream.num_layers + 1):
            state.h_BTD = stream.layer(k, state)
        done[name] = stream.epilogue(state)
    return pieces


def _decide(exits: Exits | None, signal: str, stream: str, k: int, state: StreamState, before_BTD: Tensor) -> bool:
    """One exit decision, the wait for the device included."""
    return bool((stream_scores(exits, signal, stream, k, state, before_BTD) >= 0.5).any())


def _signals(exits: Exits | None, stream: str, signals: Sequence[str]) -> list[str]:
    """Return the signals that can be measured on this stream's exits."""
    if exits is None or not exits.layers.get(stream):
        return []
    return [s for s in signals if s != "gate" or exits.config.gate]


def _decoder_pieces(
    backbone: Backbone, runtime: Runtime, exits: Exits | None, inputs: dict[str, Any], max_new_tokens: int | None
) -> Pieces:
    settings = backbone.decode_settings(max_new_tokens)
    silent = Stopwatch(torch.device("cpu"), False)
    memory_BSD = encode(backbone, exits, inputs, {}, silent, streams=runtime.streams).memory_BSD
    prompts = read_prompts(inputs, 1, settings.start_id)
    length = len(prompts[0]) - 1 + settings.max_new_tokens
    processors = backbone.token_processors(settings, None, prompts)
    executor = runtime.executor(backbone, exits, memory_BSD, backbone.memory_mask(inputs), length, processors, silent)
    executor.embed([0], 0, [[settings.start_id] * length])
    for layer in range(1, executor.num_layers + 1):
        executor.run_layer(layer, [(0, length, [0])])
    at, layer = length - 1, (executor.num_layers + 1) // 2
    pieces: Pieces = {
        "decoder.embed": partial(executor.embed, [0], at, [[settings.start_id]]),
        "decoder.head": partial(executor.choose, {executor.num_layers: [(0, at)]}),
        "decoder.memory": partial(executor.memory_rows, layer, memory_BSD),
    }
    for m in BLOCK_SIZES:
        if m <= length:
            pieces[f"decoder.layer{m}"] = partial(executor.run_layer, layer, [(length - m, length, [0])])
    if exits is not None and "decoder" in exits.layers:
        pieces["decoder.exit"] = partial(executor.choose, {exits.layers["decoder"][0]: [(0, at)]})
    for signal in _signals(exits, "decoder", DECODER_SIGNALS):
        k = exits.layers["decoder"][0] if exits is not None else 0
        pieces[f"decoder.{signal}"] = partial(executor.score, signal, k, [(0, at)])
    return pieces


def _time(pieces: Pieces, repeats: int, device: torch.device) -> dict[str, float]:
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
