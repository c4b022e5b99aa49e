"""Importers: official annotation files and folders of pictures made into our shards, one file a data set.

Names load on first use, so that ``mue data --help`` needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_mue.data.importers.importing import Imported, import_dataset
    from lightning_mue.data.importers.layouts import LAYOUTS
    from lightning_mue.data.importers.pictures import PictureSettings

__all__ = ["LAYOUTS", "Imported", "PictureSettings", "import_dataset"]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    homes = {
        "LAYOUTS": "layouts",
        "Imported": "importing",
        "PictureSettings": "pictures",
        "import_dataset": "importing",
    }
    if name not in homes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{homes[name]}"), name)
