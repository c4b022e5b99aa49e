"""What the calibration callbacks need to know of a batch: its rows and its split."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_mue.data.tasks import split_of

Batch = dict[str, Any]
BY_WORD = ("input_ids", "attention_mask", "bbox")
"""Inputs that are as long as the prompt or the page."""
SPLITS = {"propose": 0.3, "certify": 0.7}


def missing_inputs(wanted: Sequence[str], found: Container[str]) -> list[str]:
    """Return the backbone's inputs that are not there; a mask (then all tokens count) and a prompt may be missing."""
    return [name for name in wanted if name not in found and name not in ("attention_mask", "decoder_prompt")]


def rows_of(batch: Batch, keep: Sequence[bool]) -> Batch:
    """Return the batch of the rows marked in ``keep``; tensors and lists of the batch's length are cut, others stay."""
    size = len(keep)
    index = [i for i, k in enumerate(keep) if k]

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim and len(value) == size:
            return value[index]
        return [value[i] for i in index] if isinstance(value, list) and len(value) == size else value

    return {name: cut(value) for name, value in batch.items()}


def content(batch: Batch) -> str:
    """Return a hash of all that a batch's answers and scores depend on: its tensors, its rows' names and references.

    Names alone would not do: another data set may use the same, and other settings make other pixels.
    """
    names = {name: batch.get(name) for name in ("sample_id", "cluster", "group", "references")}
    digest = hashlib.sha256(repr(names).encode())
    for name, value in sorted(batch.items()):
        if isinstance(value, Tensor):
            digest.update(repr((name, value.dtype, tuple(value.shape))).encode())
            digest.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def together(batch: Batch, rows: Sequence[int]) -> Batch:
    """Return some rows as a batch of their own, without the padding that the others asked for."""
    found = rows_of(batch, [row in rows for row in range(len(batch["sample_id"]))])
    if isinstance(mask := found.get("attention_mask"), Tensor):
        valid = mask.bool().any(0)
        found |= {name: found[name][:, valid] for name in BY_WORD if name in found}
    if isinstance(prompt := found.get("decoder_prompt"), Tensor):
        found["decoder_prompt"] = prompt[:, (prompt >= 0).any(0)]
    return found


def single(batch: Batch, row: int) -> Batch:
    """Return one row as a batch of its own."""
    return together(batch, [row])


def in_split(trainer: L.Trainer, batch: Batch, split: str) -> list[bool]:
    """Say which rows belong to "propose" or "certify": by the data module, else by a hash of the cluster."""
    decide = getattr(getattr(trainer, "datamodule", None), "split_of", None)
    decide = decide or (lambda cluster: split_of(cluster, SPLITS, "calibration"))
    return [decide(cluster) == split for cluster in batch["cluster"]]


def answer_constraint(trainer: L.Trainer, end_id: int) -> Callable[[int, Tensor], list[int]] | None:
    """Return the data module's constraint to closed answers, or None if answers are free."""
    make = getattr(getattr(trainer, "datamodule", None), "answer_constraint", None)
    return make(end_id) if make is not None else None


def prepared(trainer: L.Trainer, batch: Any, dataloader_idx: int) -> Any:
    """Return a loader's batch as ``validation_step`` gets it: through the module's batch hooks, on its device."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=dataloader_idx)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=dataloader_idx)


def on_device(batch: Batch, model: nn.Module) -> Batch:
    """Move the tensors of a batch to the model's device."""
    device = next(model.parameters()).device
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
