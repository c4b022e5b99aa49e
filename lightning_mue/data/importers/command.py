"""``mue data coco|flickr8k|snli-ve|vqa|docvqa``: options, and what is printed."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from lightning_mue.data.importers.layout import SPLITS, Layout

if TYPE_CHECKING:
    from lightning_mue.data.importers.importing import Imported

ABOUT = {
    "coco": "COCO captions: captions_{train,val}2014.json, ...2017.json, or Karpathy's dataset_coco.json (whose train "
    "split takes restval in)",
    "flickr8k": "Flickr8k captions: Flickr8k.token.txt with Flickr_8k.{train,dev,test}Images.txt, or captions.txt; "
    "without a list a hash of the picture's name splits 75 : 12.5 : 12.5",
    "snli-ve": "visual entailment: snli_ve_{train,dev,test}.jsonl and the pictures of Flickr30k",
    "vqa": "VQA v2: v2_OpenEnded_mscoco_{train,val}2014_questions.json with v2_mscoco_{train,val}2014_annotations.json",
    "docvqa": "DocVQA: {train,val}_v1.0_withQT.json or {train,val}_v1.0.json; pages of one document are one cluster",
}


def add_commands(names: Any) -> None:
    """Add ``mue data NAME`` for every official layout.

    Args:
        names: the sub-parsers of ``mue data``.
    """
    for name, about in ABOUT.items():
        _add_options(names.add_parser(name, help=about, description=about), name)


def run(found: argparse.Namespace) -> None:
    """Import what the options ask for, and print what became of it."""
    from lightning_mue.data.importers.importing import import_dataset
    from lightning_mue.data.importers.layouts import LAYOUTS
    from lightning_mue.data.importers.pictures import PictureSettings
    from lightning_mue.data.importers.snli_ve import layout as snli_ve

    layout = snli_ve(found.caption_premise) if found.name == "snli-ve" else LAYOUTS[found.name]
    names = ("annotations", "images", "out", "split", "shard_size", "limit", "workers", "on_bad", "overwrite")
    pictures = PictureSettings(found.size, found.side, found.quality)
    imported = import_dataset(layout, **{name: getattr(found, name) for name in names}, settings=pictures)
    print(_in_words(imported, layout, found.split, found.out))


def _add_options(parser: argparse.ArgumentParser, name: str) -> None:
    add = parser.add_argument
    add("--annotations", required=True, nargs="+", help="folder with the official files, or the files themselves")
    add("--images", required=True, help="folder of the pictures")
    add("--out", required=True, help="folder for the shards; it may hold several splits of this data set")
    add("--split", choices=SPLITS, default="train", help="names the shards, and the official file in a folder")
    add("--size", type=int, help="shrink larger pictures to so many pixels; without it they keep their bytes")
    add("--side", choices=("longest", "shortest"), default="longest", help="the side that --size is about")
    add("--quality", type=int, default=90, help="of shrunk JPEG pictures")
    add("--shard_size", type=int, default=1000, help="pictures a shard")
    add("--limit", type=int, help="take only so many pictures, to try it out")
    add("--workers", type=int, default=1, help="processes; the shards are the same for any number")
    add("--on_bad", choices=("raise", "skip"), default="raise", help="refuse broken pictures and texts, or skip them")
    add("--overwrite", action="store_true", help="start over where another import of this split lies")
    if name == "snli-ve":
        add("--caption_premise", action="store_true", help="tell the caption too (as OFA and MuE do): it says too much")


def _in_words(imported: Imported, layout: Layout, split: str, out: str) -> str:
    """Return what is printed at the end: what was left out, and the counts."""
    lines = [f"left out: {line}" for line in imported.problems]
    lines += [imported.note] if imported.note else []
    lines.append(
        f"{split}: {imported.texts} {layout.texts} on {imported.images} pictures in {len(imported.shards)} shards "
        f"under {out}, {imported.left_out} pictures left out; all read back: {imported.samples} samples of task "
        f"{layout.task!r}"
    )
    return "\n".join(lines)
