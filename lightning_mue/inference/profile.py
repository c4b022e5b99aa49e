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
from lightning_mue.exits import Exits, attached
from lightning_mue.inference.encode import encode, stream_scores
from lightning_mue.inference.record import DECODER_SIGNALS, STREAM_SIGNALS
from lightning_mue.inference.runtime import Runtime, torch_runtime
from lightning_mue.inference.schedule import Block
from lightning_mue.inference.stopwatch import Stopwatch
from lightning_mue.latency import DecoderLatency, LatencyTable, StreamLatency
from lightning_mue.prompt import read_prompts
from lightning_mue.signals import NEEDS_LOGITS

BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64)

_STEPS_BEFORE = 3
"""Steps of a decode before its pieces are timed: they find weights where a decode finds them, one step later."""

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
    executor, start_id, length = _ready(backbone, runtime, exits, inputs, max_new_tokens)
    pieces = _stream_pieces(runtime.streams, exits, inputs) | _decoder_pieces(executor, exits, start_id, length)
    device = next(model.parameters()).device
    ms, streams = time_pieces(pieces, repeats, device), {}
    for stream in backbone.encoders:
        signals = {s: ms[f"{stream.name}.{s}"] for s in STREAM_SIGNALS if f"{stream.name}.{s}" in ms}
        fixed = ms[f"{stream.name}.prologue"] + ms[f"{stream.name}.epilogue"]
        layer, adapter = ms[f"{stream.name}.layers"] / stream.num_layers, ms.get(f"{stream.name}.adapter", 0.0)
        streams[stream.name] = StreamLatency(fixed, layer, signals, adapter)
    return LatencyTable(streams, _decoder_latency(ms, executor), device_name(device), torch.get_num_threads())


@torch.inference_mode()
def measure_decoder(
    executor: Any, start_id: int, length: int, repeats: int = 30, clock: Callable[[], float] = time.perf_counter
) -> DecoderLatency:
    """Return what the pieces of a decoder cost, exits excepted.

    Args:
        executor: of one row, new.
        start_id: any token.
        length: positions that the executor has room for.
        repeats: of each piece.
        clock: seconds.
    """
    pieces = _decoder_pieces(executor, None, start_id, length)
    return _decoder_latency(time_pieces(pieces, repeats, torch.device("cpu"), clock), executor)


def _decoder_latency(ms: dict[str, float], executor: Any) -> DecoderLatency:
    sizes, base = tuple(m for m in BLOCK_SIZES if f"decoder.layers{m}" in ms), executor.base_layers
    upper = executor.num_layers - base
    return DecoderLatency(
        sizes,
        tuple(ms[f"decoder.layers{m}"] / upper for m in sizes),
        ms["decoder.memory"] / upper,
        ms["decoder.embed"] + ms["decoder.head"],
        {s: ms[f"decoder.{s}"] for s in DECODER_SIGNALS if f"decoder.{s}" in ms},
        _exit_ms(ms),
        base,
        tuple(ms[f"decoder.base{m}"] / base for m in sizes) if base else (),
    )


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
        pieces[f"{name}.layers"] = all_layers(stream, replace(state))
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


def all_layers(stream: EncoderStream, state: StreamState) -> Callable[[], object]:
    """Return what runs every layer of a stream on the same states."""
    return _each(range(1, stream.num_layers + 1), partial(stream.layer, state=state))


def _push(executor: Any, block: Block, k: int) -> None:
    executor.run_layer(k, [block])


def _each(layers: Sequence[int], run: Callable[[int], object]) -> Callable[[], object]:
    """Return what runs layers in turn: as in a decode, the weights of the next are not in the processor's cache."""
    return lambda: [run(k) for k in layers]


def _ready(
    backbone: Backbone, runtime: Runtime, exits: Exits | None, inputs: dict[str, Any], max_new_tokens: int | None
) -> tuple[Any, int, int]:
    """Return the executor of a sample, the token that it starts with, and its positions."""
    settings = backbone.decode_settings(max_new_tokens)
    silent = Stopwatch(torch.device("cpu"), False)
    memory_BSD = encode(backbone, exits, inputs, {}, silent, streams=runtime.streams).memory_BSD
    prompts = read_prompts(inputs, 1, settings.start_id)
    length = len(prompts[0]) - 1 + settings.max_new_tokens
    processors = backbone.token_processors(settings, None, prompts)
    mask = backbone.memory_mask(inputs)
    return runtime.executor(backbone, exits, memory_BSD, mask, length, processors, silent), settings.start_id, length


def _decoder_pieces(executor: Any, exits: Exits | None, start_id: int, length: int) -> Pieces:
    layers, at = executor.num_layers, length - 1
    base, upper = range(1, executor.base_layers + 1), range(executor.base_layers + 1, layers + 1)
    executor.embed([0], 0, [[start_id] * length])
    _each([*base, *upper], partial(_push, executor, (0, length, [0])))()
    blocks: Pieces = {}
    for m in BLOCK_SIZES:
        if m <= length:
            push = partial(_push, executor, (length - m, length, [0]))
            blocks |= {f"decoder.base{m}": _each(base, push)} if base else {}
            blocks[f"decoder.layers{m}"] = _each(upper, push)
    step = {name: piece for name, piece in blocks.items() if name in ("decoder.base1", "decoder.layers1")}
    step |= {
        "decoder.embed": partial(executor.embed, [0], at, [[start_id]]),
        "decoder.head": partial(executor.choose, {layers: [(0, at)]}),
    }
    steps = _each(range(_STEPS_BEFORE), lambda _: [piece() for piece in step.values()])
    pieces: Pieces = {"decoder.steps": steps} | step | blocks
    if exits is not None and "decoder" in exits.layers:
        pieces["decoder.exit"] = partial(executor.choose, {exits.layers["decoder"][0]: [(0, at)]})
    for signal in _signals(exits, "decoder", DECODER_SIGNALS):
        k = exits.layers["decoder"][0] if exits is not None else 0
        pieces[f"decoder.{signal}"] = partial(executor.score, signal, k, [(0, at)])
    pieces["decoder.memory"] = _each(upper, lambda k: executor.project_memory(k, [0]))
    return pieces


def time_pieces(
    pieces: Pieces, repeats: int, device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Return name -> median milliseconds; pieces take turns, so that drift of the machine hits all alike."""
    samples: dict[str, list[float]] = {name: [] for name in pieces}
    for turn in range(repeats + 3):
        for name, piece in pieces.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            begin = clock()
            piece()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn >= 3:
                samples[name].append((clock() - begin) * 1e3)
    return {name: median(values) for name, values in samples.items()}
