"""What no rule can know: the depths of an oracle; and how sure a measured share is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_mue.callbacks.batches import Batch
from lightning_mue.inference import ExitEngine
from lightning_mue.inference.record import answer_positions
from lightning_mue.policy import ExitPolicy


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
            for rows, step, position in answer_positions(out.prompt_lengths.numpy(), tokens_BT.shape[1]):
                index = torch.from_numpy(rows).to(tokens_BT.device)
                for k in sorted(layers, reverse=True):
                    agrees = executor.exit_logits(k, index, position).argmax(-1) == tokens_BT[index, step]
                    depth_BT[index[agrees], step] = k
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
