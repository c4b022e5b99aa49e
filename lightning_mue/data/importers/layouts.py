"""All official layouts by name."""

from __future__ import annotations

from lightning_mue.data.importers import coco, docvqa, flickr8k, snli_ve, vqa
from lightning_mue.data.importers.layout import Layout

LAYOUTS: dict[str, Layout] = {module.LAYOUT.name: module.LAYOUT for module in (coco, flickr8k, snli_ve, vqa, docvqa)}
