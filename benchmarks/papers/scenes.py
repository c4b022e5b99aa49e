"""The built-in scenes as the benchmarks use them: those of ``mue quickstart``, with more pictures.

python -m papers.scenes SHARDS
python -m papers.scenes SINGLES --singles      # 5,000 pictures of one object each: zero-shot needs many to certify
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from lightning_mue.data.scenes import write_scenes
from lightning_mue.quickstart import EVAL_MIX, SIZE, TRAIN_MIX

PICTURES = {"train": 24_000, "val": 6_000, "test": 1_500}


def write(folder: str | Path, seed: int = 0) -> Path:
    """Draw the shards that are not there yet; every picture of train, val and test is another."""
    for split, count in PICTURES.items():
        if not list(Path(folder).glob(f"{split}-*.tar")):
            mix = TRAIN_MIX if split == "train" else EVAL_MIX
            write_scenes(folder, count, seed, split, SIZE, mix=mix)
    return Path(folder)


def write_singles(folder: str | Path, count: int = 5_000, seed: int = 7) -> Path:
    """Draw validation shards of one object a picture; by another seed, so that they are not those of ``write``."""
    mix = replace(EVAL_MIX, objects={1: 1}, levels={1: 1}, questions_per_scene=1)
    write_scenes(folder, count, seed, "val", SIZE, mix=mix)
    return Path(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--singles", action="store_true", help="pictures of one object, to calibrate zero-shot on")
    args = parser.parse_args()
    (write_singles if args.singles else write)(args.folder)
