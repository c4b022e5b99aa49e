"""The built-in scenes as the benchmarks use them: those of ``mue quickstart``, with more pictures.

python -m papers.scenes SHARDS
"""

from __future__ import annotations

import argparse
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    write(parser.parse_args().folder)
