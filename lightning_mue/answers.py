"""What a policy answers on many samples: quality, agreement with full depth, depths and work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_mue.backbones import num_layers
from lightning_mue.callbacks.batches import Batch, single
from lightning_mue.inference import ExitEngine
from lightning_mue.inference.compare import Variant
from lightning_mue.inference.rows import groups_of
from lightning_mue.metrics.answers import Score
from lightning_mue.policy import ExitPolicy


@dataclass
class Answers:
    """One policy's answers, in the order of the batches.

    Args:
        scores: of each sample.
        clusters: its source.
        texts: what was said.
        depths: stream name -> exit depths of all samples (decoder: of all tokens).
        by_row: batch -> row -> decoder depth of each token.
        computed: mean decoder layers computed per position, those of decoder prompts among them.
        filled: mean layers per position whose K/V were made up.
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

    @property
    def decoder_BT(self) -> np.ndarray:
        """Decoder depth of each token; 0 after the end."""
        depth_BT = np.zeros((len(self.texts), max(map(len, self._rows))), dtype=np.int64)
        for row, depths in zip(depth_BT, self._rows, strict=True):
            row[: len(depths)] = depths
        return depth_BT

    @property
    def _rows(self) -> list[list[int]]:
        return [row for batch in self.by_row for row in batch]

    @property
    def mean_depths(self) -> dict[str, float]:
        """Stream name -> mean exit depth."""
        return {stream: float(depth.mean()) for stream, depth in self.depths.items()}

    def same(self, other: Answers) -> float:
        """Share of samples with the other's very text."""
        return float(np.mean([a == b for a, b in zip(self.texts, other.texts, strict=True)]))


def answer(
    model: nn.Module,
    policy: ExitPolicy,
    batches: Iterable[Batch],
    data: Any,
    score: Score,
    forced: Sequence[Sequence[Sequence[int]]] | None = None,
    done: Callable[[int], object] = lambda size: None,
) -> Answers:
    """Decode all batches.

    MuE's published rule judges a batch as one; its own scripts decode one sample at a time, and so does this then.

    Args:
        model: the backbone with its exits.
        policy: to obey.
        batches: with their ``references`` and ``cluster``, on the model's device.
        data: the datamodule, for its processor and the constraint to closed answers.
        score: prediction, references -> number.
        forced: batch -> row -> depth of each token, to replay the depths of another run.
        done: told of each batch's size.
    """
    if any(rule.signal == "flat_similarity" for rule in policy.rules.values()):
        batches = [single(batch, row) for batch in batches for row in range(len(batch["sample_id"]))]
    engine = ExitEngine(model, policy, check_fingerprint=False)
    prefix = data.answer_constraint(engine.backbone.decode_settings(None).end_ids[0])
    found, texts, scores, clusters = [], list[str](), list[float](), list[str]()
    for k, batch in enumerate(batches):
        with torch.inference_mode():
            if forced is not None:
                output, _ = engine.run(None, prefix, False, batch, forced=forced[k])
            else:
                output = engine.generate(None, prefix, groups=groups_of(policy, batch), **batch)
        said = data.processor.decode(output.sequences[:, 1:])
        found.append(output)
        texts += said
        scores += [score(text, refs) for text, refs in zip(said, batch["references"], strict=True)]
        clusters += batch["cluster"]
        done(len(said))
    depths = {stream: [o.exit_depths[stream].cpu() for o in found] for stream in found[0].exit_depths}
    by_row = [[row[row > 0].tolist() for row in depth_BT] for depth_BT in depths["decoder"]]
    positions = sum(len(row) for rows in by_row for row in rows) + sum(int(o.prompt_lengths.sum()) for o in found)
    return Answers(
        scores=np.array(scores),
        clusters=clusters,
        texts=texts,
        depths={stream: torch.cat([d[d > 0].flatten() for d in parts]).numpy() for stream, parts in depths.items()},
        by_row=by_row,
        computed=sum(o.pairs for o in found) / positions,
        filled=sum(o.filled for o in found) / positions,
        layers_saved=_layers_saved(depths, num_layers(engine.backbone)),
    )


def _layers_saved(depths: Mapping[str, Sequence[Tensor]], layers: Mapping[str, int]) -> float:
    """Return 1 - layers run / layers, of encoder and decoder together, each token counting its sample's encoder."""
    encoders = [stream for stream in layers if stream not in ("vision", "decoder")]
    last = layers["decoder"] + (layers[encoders[0]] if encoders else 0)
    run = tokens = 0.0
    for k, depth_BT in enumerate(depths["decoder"]):
        length_B = (depth_BT > 0).sum(1)
        run += float(depth_BT.sum())
        if encoders:
            run += float((length_B * torch.stack([depths[stream][k] for stream in encoders]).float().mean(0)).sum())
        tokens += float(length_B.sum())
    return 1 - run / tokens / last


def plain_answers(
    answer_batch: Variant,
    batches: Iterable[Batch],
    data: Any,
    score: Score,
    done: Callable[[int], object] = lambda size: None,
) -> tuple[np.ndarray, list[str]]:
    """Return the scores and the texts of what another engine answers."""
    scores, texts = list[float](), list[str]()
    for batch in batches:
        said = data.processor.decode(answer_batch(batch)[:, 1:])
        scores += [score(text, refs) for text, refs in zip(said, batch["references"], strict=True)]
        texts += said
        done(len(said))
    return np.array(scores), texts
