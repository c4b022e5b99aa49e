"""Recording a trace: one full-depth pass sees every exit, then every exit is tried alone.

Shapes: ``B`` samples of a batch, ``T`` steps, ``E`` exits of a stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_mue.backbones import StreamState, num_layers
from lightning_mue.exits import Exits, attached, exits_on_the_way
from lightning_mue.inference.encode import OnExit, stream_scores
from lightning_mue.inference.engine import ExitEngine
from lightning_mue.inference.rows import PrefixFn
from lightning_mue.inference.torch_executor import TorchExecutor
from lightning_mue.policy import ExitPolicy, ExitRule
from lightning_mue.trace import StreamTrace, Trace

STREAM_SIGNALS = ("similarity", "gate")
DECODER_SIGNALS = ("similarity", "gate", "confidence", "margin", "entropy")

ScoreOf = Callable[[Tensor], Mapping[str, Sequence[float]]]
"""Sequences ``[B, 1 + T]`` -> metric -> score of each sample."""


@torch.inference_mode()
def record(
    model: nn.Module,
    inputs: dict[str, Any],
    sample_ids: Sequence[str],
    clusters: Sequence[str],
    score_of: ScoreOf,
    max_new_tokens: int | None = None,
    prefix_fn: PrefixFn | None = None,
    meta: dict[str, Any] | None = None,
    groups: Sequence[str] | None = None,
    only_decoder: bool = False,
) -> Trace:
    """Return the trace of one batch.

    Args:
        model: a backbone with exits attached.
        inputs: the backbone's own inputs.
        sample_ids: ``B`` distinct names.
        clusters: ``B`` names of the sources.
        score_of: scores decoded sequences.
        max_new_tokens: as in ``ExitEngine.generate``.
        prefix_fn: as in ``ExitEngine.generate``.
        meta: kept in the trace.
        groups: ``B`` names of the groups that promises may be about.
        only_decoder: leave the other streams out, and try no exit alone: what the decoder's exits change is known then,
            but not what that does to the score.

    Raises:
        ValueError: no exits are attached.
    """
    exits = attached(model)
    if exits is None:
        raise ValueError("There are no exits to record; call `attach_exits(model, config)` and train them.")
    signals = [s for s in DECODER_SIGNALS if s != "gate" or exits.config.gate]
    seen, on_exit = _stream_scores(exits, signals)
    engine = ExitEngine(model, ExitPolicy.full_depth())
    full, executor = engine.run(max_new_tokens, prefix_fn, False, inputs, on_exit)
    tokens_BT = full.sequences[:, 1:]
    prompt_B = full.prompt_lengths.numpy()
    layers = num_layers(engine.backbone)
    taken_BT = (full.exit_depths["decoder"] > 0).numpy()
    alone = partial(_alone, model, inputs, full.sequences, score_of, max_new_tokens, prefix_fn)
    streams = {}
    for name, exit_layers in exits_on_the_way(engine.backbone, exits).items():
        if name == "decoder":
            scores, agree = _decoder_scores(executor, exit_layers, signals, tokens_BT, prompt_B, taken_BT)
            untried: dict[str, np.ndarray] = {}
            same = (agree | ~taken_BT[..., None]).all(1)
            score_at, same_at = (untried, same) if only_decoder else alone(name, exit_layers)
            streams[name] = StreamTrace(exit_layers, layers[name], scores, score_at, same_at, agree)
        elif not only_decoder:
            scores = {k: torch.stack(v, 1).numpy() for k, v in seen[name].items()}
            streams[name] = StreamTrace(exit_layers, layers[name], scores, *alone(name, exit_layers))
    return Trace(
        list(sample_ids),
        list(clusters),
        list(groups) if groups is not None else [""] * len(sample_ids),
        _arrays(score_of(full.sequences)),
        taken_BT.sum(1),
        prompt_B,
        streams,
        dict(meta or {}),
    )


def _stream_scores(exits: Exits, signals: Sequence[str]) -> tuple[dict[str, dict[str, list[Tensor]]], OnExit]:
    """Return what will hold stream -> signal -> scores ``[B]`` of each exit, and what fills it during an encoding."""
    seen: dict[str, dict[str, list[Tensor]]] = {}

    def on_exit(stream: str, k: int, state: StreamState, before_BTD: Tensor) -> None:
        if k in exits.layers.get(stream, ()):
            for signal in STREAM_SIGNALS:
                if signal in signals:
                    score_B = stream_scores(exits, signal, stream, k, state, before_BTD)
                    seen.setdefault(stream, {}).setdefault(signal, []).append(score_B.float().cpu())

    return seen, on_exit


def _decoder_scores(
    executor: TorchExecutor,
    layers: Sequence[int],
    signals: Sequence[str],
    tokens_BT: Tensor,
    prompt_B: np.ndarray,
    taken_BT: np.ndarray,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return signal -> scores ``[B, T, E]`` and agreement ``[B, T, E]``, from the states of a full-depth decode.

    Both are nothing where a row had ended.
    """
    shape = (*tokens_BT.shape, len(layers))
    scores = {signal: np.zeros(shape, dtype=np.float32) for signal in signals}
    agree = np.zeros(shape, dtype=bool)
    for rows, step, position in answer_positions(prompt_B, tokens_BT.shape[1]):
        index = torch.from_numpy(rows).to(tokens_BT.device)
        for e, k in enumerate(layers):
            logits_RV = executor.exit_logits(k, index, position)
            agree[rows, step, e] = (logits_RV.argmax(-1) == tokens_BT[index, step]).cpu().numpy()
            for signal in signals:
                found_R = executor.scores(signal, k, index, position, logits_RV)
                scores[signal][rows, step, e] = found_R.float().cpu().numpy()
    return {signal: np.where(taken_BT[..., None], s, np.float32(0)) for signal, s in scores.items()}, agree & taken_BT[
        ..., None
    ]


def answer_positions(prompt_B: np.ndarray, steps: int) -> Iterator[tuple[np.ndarray, int, int]]:
    """Yield rows, a step of theirs (from the first answer token) and the position that chooses it."""
    for first in np.unique(prompt_B).tolist():  # rows whose answers begin at one position
        rows = np.flatnonzero(prompt_B == first)
        yield from ((rows, step, first + step) for step in range(steps))


def _alone(
    model: nn.Module,
    inputs: dict[str, Any],
    full: Tensor,
    score_of: ScoreOf,
    max_new_tokens: int | None,
    prefix_fn: PrefixFn | None,
    stream: str,
    layers: Sequence[int],
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Leave one stream always at each of its exits: metric -> scores, and equality with full depth, all ``[B, E]``."""
    scores, same = [], []
    for k in layers:
        engine = ExitEngine(model, ExitPolicy({stream: ExitRule.static(k)}))
        sequences = engine.generate(max_new_tokens, prefix_fn, **inputs).sequences
        scores.append(_arrays(score_of(sequences)))
        same.append(equal_rows(sequences, full, engine.backbone.decode_settings(None).pad_id).cpu().numpy())
    return {metric: np.stack([at[metric] for at in scores], 1) for metric in scores[0]}, np.stack(same, 1)


def _arrays(scores: Mapping[str, Sequence[float]]) -> dict[str, np.ndarray]:
    return {metric: np.asarray(values, dtype=np.float64) for metric, values in scores.items()}


def equal_rows(a_BT: Tensor, b_BT: Tensor, pad_id: int) -> Tensor:
    """Return ``[B]``: two batches of sequences hold the same tokens, whatever their padded lengths."""
    length = max(a_BT.shape[1], b_BT.shape[1])
    pad = lambda t: torch.nn.functional.pad(t, (0, length - t.shape[1]), value=pad_id)  # noqa: E731
    return (pad(a_BT) == pad(b_BT)).all(1)
