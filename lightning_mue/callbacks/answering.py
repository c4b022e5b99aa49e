"""Answering: a model that decodes a trainer's samples, as what a calibration runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import nn

from lightning_mue.backbones import view
from lightning_mue.callbacks.batch_keys import BatchKeys
from lightning_mue.callbacks.batches import Batch
from lightning_mue.callbacks.decoding import SplitDecoder
from lightning_mue.callbacks.journal import Journal
from lightning_mue.callbacks.scoring import Scoring
from lightning_mue.inference.profile import measure_latency
from lightning_mue.inference.runtime import in_precision, make_runtime
from lightning_mue.latency import LatencyTable
from lightning_mue.policy import ExitPolicy


@dataclass
class Answering:
    """A model that decodes; a `Subject`.

    Args:
        trainer: whose data.
        model: the backbone.
        scoring: of the answers.
        journal: of finished pieces.
        keys: of the batches.
        max_new_tokens: of each answer; the generation config's if not given.
        runtime: what runs the layers.
    """

    trainer: L.Trainer
    model: nn.Module
    scoring: Scoring
    journal: Journal
    keys: BatchKeys
    max_new_tokens: int | None
    runtime: str = "torch"

    @property
    def settings(self) -> dict[str, Any]:
        """Decode settings."""
        closed = list(getattr(getattr(self.trainer, "datamodule", None), "closed_answers", None) or [])
        precision = str(next(self.model.parameters()).dtype).removeprefix("torch.")
        corpus = {name: value for name, value in self.scoring.key.items() if name != "metrics"}
        if self.keys.group is not None:
            corpus["group_by"] = self.keys.group
        how = {"answers": closed, "precision": precision, "batching": "per row", "runtime": self.runtime}
        return {**view(self.model).decode_settings(self.max_new_tokens).plain, **how, **corpus}

    def measure(self, one: Batch, repeats: int, precision: str | None) -> LatencyTable:
        """Measure what each piece of an answer costs."""
        device, model = next(self.model.parameters()).device, in_precision(self.model, precision)
        inputs = {k: v.to(device) for k, v in one.items() if hasattr(v, "to")}
        dtype = next(model.parameters()).dtype
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        runtime = make_runtime(self.runtime, view(model), precision)
        return measure_latency(model, inputs, repeats, self.max_new_tokens, runtime)

    def decoder(self, split: str, groups: Sequence[str] | None) -> SplitDecoder:
        """Return what decodes a split."""
        more = (self.scoring, self.max_new_tokens, self.journal, self.keys, split, groups, self.runtime)
        return SplitDecoder(self.trainer, self.model, *more)

    def is_simulated_exactly(self, policy: ExitPolicy) -> bool:
        """Whether a full-depth decode, recorded in torch, tells which outputs change: only the decoder leaves early."""
        plain = policy.kv_fill == "just-in-time" and policy.precision is None and self.runtime == "torch"
        return plain and set(policy.rules) == {"decoder"} and next(self.model.parameters()).dtype == torch.float32
