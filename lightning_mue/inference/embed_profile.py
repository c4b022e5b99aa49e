"""Measuring what embedding a picture or a text costs on this device, piece by piece, at batch 1."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from lightning_mue.backbones import StreamState
from lightning_mue.inference.embed_branch import EmbedBranch
from lightning_mue.inference.embedding import EmbedEngine, Query
from lightning_mue.inference.profile import Pieces, all_layers, device_name, time_pieces
from lightning_mue.latency import DecoderLatency, LatencyTable, StreamLatency
from lightning_mue.policy import OF_EMBEDDINGS

NO_DECODER = DecoderLatency((1,), (0.0,), 0.0, 0.0)


@torch.inference_mode()
def measure_embedding(engine: EmbedEngine, query: Query, given: Tensor, repeats: int = 30) -> LatencyTable:
    """Return what each piece of embedding one query costs: medians over interleaved repeats, after a warm-up.

    Pooling and projection always run, so they are part of what is fixed. A signal that has made the embedding leaves
    nothing to be made by leaving.

    Args:
        engine: as for recording.
        query: which tower is measured.
        given: what it reads, of one query.
        repeats: of each piece.
    """
    branch, device = engine.branch(query), given.device
    stream, exits, signals = branch.stream, branch.attached(), branch.signals
    k, state = exits.layers[stream.name][0], branch.start(given)
    pieces: Pieces = {
        "prologue": partial(branch.start, given),
        "layers": all_layers(stream, replace(state)),
        "embedding": partial(branch.pool, state),
        "adapter": partial(exits.adapt, stream.name, k, state.h_BTD),
    }
    pieces |= {signal: partial(_decide, branch, signal, k, state) for signal in signals}
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
