"""What a policy answers on many samples: quality, agreement with full depth, depths and work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_mue.backbones import num_layers
from lightning_mue.callbacks.batches import single
from lightning_mue.inference import ExitEngine
from lightning_mue.inference.compare import Variant
from lightning_mue.policy import ExitPolicy

Batch = dict[str, Any]
Scorer = Callable[[str, Sequence[str]], float]


@dataclass
class Answers:
    """One policy's answers, in the order of the batches.

    Args:
        scores: of each sample.
        clusters: its source.
        texts: what was said.
        depths: stream name -> exit depths of all samples (decoder: of all tokens).
        by_row: batch -> row -> depth of each token.
        computed: mean decoder layers computed per token (pairs / tokens).
        filled: mean layers per token whose K/V were made up.
        layers_saved: MuE's "expected time reduction": the share of encoder and decoder layers not run, weighted by
            tokens; it counts no vision tower, no catching up and no signal (Tang et al. 2023, section 4.1).
    """

    scores: np.ndarray
    clusters: list[str]
    texts: list[str]
    depths: dict[str, np.ndarray]
    by_row: list[list[list[int]]] = field(repr=False)
    computed: float
    filled: float
    layers_saved: float

    @property
    def quality(self) -> float:
        """Mean score."""
        return float(self.scores.mean())

    def depth(self, stream: str) -> float:
        """Mean exit depth."""
        return float(self.depths[stream].mean())

    def same(self, other: Answers) -> float:
        """Share of samples with the other's very text."""
        return float(np.mean([a == b for a, b in zip(self.texts, other.texts, strict=True)]))


def answer(
    model: nn.Module,
    policy: ExitPolicy,
    batches: Iterable[Batch],
    data: Any,
    score: Scorer,
    forced: list[list[list[int]]] | None = None,
) -> Answers:
    """Decode all batches; ``forced`` replays the depths of another run, batch by batch.

    MuE's published rule judges a batch as one; its own scripts decode one sample at a time, and so does this then.
    """
    if any(rule.signal == "flat_similarity" for rule in policy.rules.values()):
        batches = [single(batch, row) for batch in batches for row in range(len(batch["sample_id"]))]
    engine = ExitEngine(model, policy, check_fingerprint=False)
    end_id = engine.backbone.decode_settings(None).end_ids[0]
    scores, clusters, texts, by_row = [], [], [], []
    depths: dict[str, list[np.ndarray]] = {}
    pairs = filled = tokens = 0
    run = 0.0
    layers = num_layers(engine.backbone)
    stack = [stream for stream in layers if stream not in ("vision", "decoder")]
    for k, batch in enumerate(batches):
        with torch.inference_mode():
            out, _ = engine.run(
                None, data.answer_constraint(end_id), False, batch, forced=None if forced is None else forced[k]
            )
        found = data.processor.decode(out.sequences[:, 1:])
        texts += found
        clusters += batch["cluster"]
        scores += [score(text, refs) for text, refs in zip(found, batch["references"], strict=True)]
        for stream, depth in out.exit_depths.items():
            depths.setdefault(stream, []).append(depth[depth > 0].flatten().numpy())
        by_row.append([row[row > 0].tolist() for row in out.exit_depths["decoder"]])
        pairs, filled = pairs + out.pairs, filled + out.filled
        length_B = (out.exit_depths["decoder"] > 0).sum(1)
        encoder_B = torch.stack([out.exit_depths[stream] for stream in stack]).float().mean(0)
        tokens += int(length_B.sum())
        run += float((length_B * encoder_B).sum() + out.exit_depths["decoder"].sum())
    joined = {stream: np.concatenate(parts) for stream, parts in depths.items()}
    saved = 1 - run / tokens / (layers[stack[0]] + layers["decoder"])
    return Answers(np.array(scores), clusters, texts, joined, by_row, pairs / tokens, filled / tokens, saved)


def plain_answers(answer_one: Variant, batches: Iterable[Batch], data: Any, score: Scorer) -> list[float]:
    """Return the scores of what another engine answers."""
    scores = []
    for batch in batches:
        texts = data.processor.decode(answer_one(batch)[:, 1:])
        scores += [score(text, refs) for text, refs in zip(texts, batch["references"], strict=True)]
    return scores


def oracle_depths(model: nn.Module, batches: Sequence[Batch], data: Any, layers: Sequence[int]) -> list:
    """Return, by batch and row, the first exit that chooses each full-depth token (the last layer if none does)."""
    engine = ExitEngine(model, ExitPolicy.full_depth(), check_fingerprint=False)
    end_id = engine.backbone.decode_settings(None).end_ids[0]
    found = []
    for batch in batches:
        with torch.inference_mode():
            out, executor = engine.run(None, data.answer_constraint(end_id), False, batch)
            tokens_BT = out.sequences[:, 1:]
            depth_BT = torch.full_like(tokens_BT, executor.num_layers)
            for position in range(tokens_BT.shape[1]):
                for k in sorted(layers, reverse=True):
                    agrees = executor.exit_logits(k, slice(None), position).argmax(-1) == tokens_BT[:, position]
                    depth_BT[agrees, position] = k
        taken = out.exit_depths["decoder"] > 0
        found.append([row[keep].tolist() for row, keep in zip(depth_BT, taken, strict=True)])
    return found


def interval(scores: np.ndarray, full: np.ndarray, clusters: Sequence[str], draws: int = 2000) -> tuple[float, float]:
    """Return the 95 % interval of mean(scores) / mean(full) by drawing whole clusters again (seed 0)."""
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.stack([np.bincount(index, scores), np.bincount(index, full)])
    picks = np.random.default_rng(0).integers(sums.shape[1], size=(draws, sums.shape[1]))
    top, bottom = sums[:, picks].sum(-1)
    low, high = np.percentile(top / np.maximum(bottom, 1e-12), [2.5, 97.5])
    return float(low), float(high)
