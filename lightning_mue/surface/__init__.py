"""Exits behind transformers' own surface: ``generate``, with its processors, streamers, beams, and pipelines."""

from lightning_mue.surface.early_exit import EarlyExit, early_exit
from lightning_mue.surface.enable import disable, enable

__all__ = ["EarlyExit", "disable", "early_exit", "enable"]
