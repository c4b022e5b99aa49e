"""Data: the built-in scenes, tasks made of shard records, WebDataset shards, tokenizer and the data module.

``ShardsDataModule`` loads on first use, so that scenes, tasks and shards need no Lightning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_mue.data.module import ShardsDataModule

__all__ = ["ShardsDataModule"]


def __getattr__(name: str) -> Any:
    if name == "ShardsDataModule":
        from lightning_mue.data.module import ShardsDataModule

        return ShardsDataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
