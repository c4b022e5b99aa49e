"""Exits: configuration, adapters, gates, and how they hang on a backbone."""

from lightning_mue.exits.attach import PREFIX, Exits, attach_exits, attached, detach_exits
from lightning_mue.exits.config import ExitConfig

__all__ = ["PREFIX", "ExitConfig", "Exits", "attach_exits", "attached", "detach_exits"]
