"""Recording what every exit of a tower would do to embeddings, in one full-depth pass.

Shapes: ``B`` queries of a batch, ``X`` exits, ``E`` width of embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_mue.backbones import StreamState
from lightning_mue.inference.embedding import EmbedEngine, Query
from lightning_mue.inference.encode import climb
from lightning_mue.trace import StreamTrace, Trace

EmbedScoreOf = Callable[[Tensor], np.ndarray]
"""Unit vectors of the batch's queries ``[B, E]`` -> the metric's score of each, ``[B]``."""


@torch.inference_mode()
def record_embeddings(
    engine: EmbedEngine,
    query: Query,
    given: Tensor,
    sample_ids: Sequence[str],
    clusters: Sequence[str],
    groups: Sequence[str],
    metric: str,
    score_of: EmbedScoreOf,
    meta: dict[str, Any],
) -> Trace:
    """Return the trace of one batch: leaving the queries' tower changes nothing but their embeddings.

    So simulation is exact here. An output counts as that of full depth where its score is.

    Args:
        engine: of a full-depth policy, with the classes that ``class_margin`` is asked about.
        query: which tower is left.
        given: what it reads.
        sample_ids: ``B`` distinct names.
        clusters: ``B`` names of the sources.
        groups: ``B`` names of the groups that promises may be about.
        metric: that ``score_of`` measures.
        score_of: scores embeddings.
        meta: kept in the trace.

    Raises:
        ValueError: the tower has no exits.
    """
    branch = engine.branch(query)
    stream, signals = branch.stream, branch.signals
    layers = branch.attached().layers[stream.name]
    scores: dict[str, list[Tensor]] = {signal: [] for signal in signals}
    found: list[np.ndarray] = []

    def on_exit(_stream: str, k: int, state: StreamState, before_BTD: Tensor) -> None:
        if k in layers:
            for signal in signals:
                scores[signal].append(branch.scores(signal, k, state, before_BTD).float().cpu())
            found.append(score_of(branch.left(k, state)))

    vectors_BE, _, _ = climb(stream, branch, branch.start(given), None, on_exit)
    full_B, at_BX = score_of(vectors_BE), np.stack(found, 1)
    table = {signal: torch.stack(columns, 1).numpy() for signal, columns in scores.items()}
    nothing_B = np.zeros(len(sample_ids), dtype=np.int64)
    seen = StreamTrace(layers, stream.num_layers, table, {metric: at_BX}, at_BX == full_B[:, None])
    names = (list(sample_ids), list(clusters), list(groups))
    return Trace(*names, {metric: full_B}, nothing_B, nothing_B, {stream.name: seen}, meta)
