"""A trained recipe, read back: the module and its data as the checkpoint knows them."""

from __future__ import annotations

import torch

from lightning_mue.checkpoint import load_checkpoint
from lightning_mue.data import ShardsDataModule
from lightning_mue.training import MultiExitModule


def load_run(ckpt_path: str, **changed: object) -> tuple[MultiExitModule, ShardsDataModule]:
    """Return the module in eval mode and its data module, with ``changed`` settings (where the shards lie, say)."""
    module, _ = load_checkpoint(ckpt_path)
    checkpoint = torch.load(ckpt_path, map_location="cpu", weights_only=True)
    settings = {k: v for k, v in checkpoint["datamodule_hyper_parameters"].items() if k[0] != "_"}
    data = ShardsDataModule(**settings | changed)
    data.load_state_dict(checkpoint["ShardsDataModule"])
    return module, data
