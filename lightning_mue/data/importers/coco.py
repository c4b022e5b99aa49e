"""COCO captions: the official files of 2014 and 2017, and Karpathy's split of 2014."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from lightning_mue.data.importers.annotations import CAPTIONS, KARPATHY, by_kind
from lightning_mue.data.importers.entry import Entry, captioned, key_of
from lightning_mue.data.importers.layout import Layout

NEEDS = "captions_{train,val}2014.json, captions_{train,val}2017.json or Karpathy's dataset_coco.json"


def parse(files: Mapping[str, Any], split: str) -> Iterator[Entry]:
    """Yield the pictures of a split; of an official file all, whatever the split.

    Raises:
        ValueError: the files are others.
    """
    found = by_kind(files, [CAPTIONS, KARPATHY], NEEDS)
    if len(found) > 1:
        raise ValueError(f"{' and '.join(files)}: coco takes one file, {NEEDS}")
    return _karpathy(found[KARPATHY], split) if KARPATHY in found else _official(found[CAPTIONS])


def _official(content: Mapping[str, Any]) -> Iterator[Entry]:
    captions = defaultdict(list)
    for annotation in content["annotations"]:
        captions[annotation["image_id"]].append(annotation["caption"])
    for image in content["images"]:
        yield captioned(key_of("coco", image["id"]), image["file_name"], captions[image["id"]])


def _karpathy(content: Mapping[str, Any], split: str) -> Iterator[Entry]:
    # "restval" is what Karpathy's validation and test splits left of COCO's; everyone trains on it.
    parts = {"train", "restval"} if split == "train" else {split}
    for image in content["images"]:
        if "cocoid" not in image:
            raise ValueError(f"the split of {content.get('dataset')!r} holds no pictures of COCO; needed is {NEEDS}")
        if image["split"] in parts:
            file = f"{image['filepath']}/{image['filename']}"
            yield captioned(key_of("coco", image["cocoid"]), file, [s["raw"] for s in image["sentences"]])


LAYOUT = Layout(
    name="coco",
    task="caption",
    texts="captions",
    files=lambda split: [
        ("dataset_coco.json",),
        (f"captions_{split}2014.json",),
        (f"captions_{split}2017.json",),
    ],
    parse=parse,
)
