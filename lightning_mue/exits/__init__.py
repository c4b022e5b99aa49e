"""Exits: configuration, adapters, gates, and how they hang on a backbone."""

from lightning_mue.exits.attach import Exits, attach_exits, attached, detach_exits, exits_on_the_way
from lightning_mue.exits.config import ExitConfig
from lightning_mue.exits.exits_file import load_exits, save_exits

__all__ = [
    "ExitConfig",
    "Exits",
    "attach_exits",
    "attached",
    "detach_exits",
    "exits_on_the_way",
    "load_exits",
    "save_exits",
]
