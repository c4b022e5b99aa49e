"""Measuring what embedding a picture costs on this device, piece by piece, at batch 1."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from lightning_mue.backbones import StreamState
from lightning_mue.inference.embed_branch import EmbedBranch
from lightning_mue.inference.embed_record import embed_signals, image_exits
from lightning_mue.inference.embedding import EmbedEngine
from lightning_mue.inference.profile import Pieces, all_layers, device_name, time_pieces
from lightning_mue.latency import DecoderLatency, LatencyTable, StreamLatency
from lightning_mue.policy import OF_EMBEDDINGS

NO_DECODER = DecoderLatency((1,), (0.0,), 0.0, 0.0)


@torch.inference_mode()
def measure_embedding(engine: EmbedEngine, pixel_values: Tensor, repeats: int = 30) -> LatencyTable:
    """Return what each piece of embedding one picture costs: medians over interleaved repeats, after a warm-up.

    Pooling and projection always run, so they are part of what is fixed. A signal that has made the embedding leaves
    nothing to be made by leaving.

    Args:
        engine: as for recording.
        pixel_values: one picture ``[1, 3, H, W]``.
        repeats: of each piece.
    """
    stream, device = engine.contrastive.image, pixel_values.device
    exits = image_exits(engine)
    k = exits.layers[stream.name][0]
    state = stream.prologue({"pixel_values": pixel_values}, {})
    pieces: Pieces = {
        "prologue": partial(stream.prologue, {"pixel_values": pixel_values}, {}),
        "layers": all_layers(stream, replace(state)),
        "embedding": partial(engine.contrastive.image_embedding, state),
        "adapter": partial(exits.adapt, stream.name, k, state.h_BTD),
    }
    signals = embed_signals(engine)
    pieces |= {signal: partial(_decide, engine.image_branch(), signal, k, state) for signal in signals}
    ms = time_pieces(pieces, repeats, device)
    cost = StreamLatency(
        ms["prologue"] + ms["embedding"],
        ms["layers"] / stream.num_layers,
        {signal: ms[signal] for signal in signals},
        ms["adapter"],
        {signal: -ms["embedding"] for signal in signals if signal in OF_EMBEDDINGS},
    )
    return LatencyTable({stream.name: cost}, NO_DECODER, device_name(device), torch.get_num_threads())


def _decide(branch: EmbedBranch, signal: str, k: int, state: StreamState) -> bool:
    """One exit decision, the wait for the device included."""
    return bool((branch.scores(signal, k, state, state.h_BTD) >= 0.5).any())
