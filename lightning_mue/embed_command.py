"""``mue embed``: pictures and texts of a bundle that compares them, and which classes pictures are of."""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_mue.certificate import ONE_SIDE
from lightning_mue.export import load_embedder
from lightning_mue.files import write_bytes
from lightning_mue.inference.embedding import Embedded, EmbedEngine
from lightning_mue.picture_files import read_pictures


def main(parser: argparse.ArgumentParser, args: Sequence[str]) -> None:
    """Read the command line and do what it asks for."""
    found = _arguments(parser, args)
    engine = load_embedder(found.bundle)
    if found.classes is not None:
        _classify(engine, found.image, found.classes)
        return
    of_side = {side: engine.full_depth if found.full_depth == side else engine for side in ("image", "text")}
    parts: dict[str, Embedded] = {}
    if found.image:
        parts["image"] = of_side["image"].embed_images(read_pictures(found.image))
    if found.text:
        parts["text"] = of_side["text"].embed_texts(found.text)
    for name, part in parts.items():
        print(f"{name}: {part.vectors.shape[1]} numbers each; layers run {part.depths.tolist()}")
    if len(parts) == 2:
        cosines_BC = parts["image"].vectors @ parts["text"].vectors.T
        _print_best(found.image, found.text, cosines_BC.tolist(), "+.3f", len(found.text))
        if engine.leaves_both_early and found.full_depth is None:
            print(f"{ONE_SIDE} `--full-depth image` or `text` embeds that side so.")
    if found.out:
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {name: part.vectors.cpu().numpy() for name, part in parts.items()}
        np.savez(buffer, **arrays)
        write_bytes(Path(found.out), buffer.getvalue())
        print(found.out)


def _arguments(parser: argparse.ArgumentParser, args: Sequence[str]) -> argparse.Namespace:
    parser.add_argument("bundle", help="folder made by `mue freeze` of a model that compares (CoCa)")
    parser.add_argument("--image", action="append", default=[], help="picture; may be given several times")
    parser.add_argument("--text", action="append", default=[], help="text; may be given several times")
    parser.add_argument(
        "--classes",
        nargs="?",
        const="",
        help="file of classes, one a line, of which the likeliest are told for each picture; without a name, those "
        "that the policy was calibrated for",
    )
    parser.add_argument(
        "--full-depth",
        choices=["image", "text"],
        help="embed this side at full depth, as a gallery in which the other looks: what certificates are about",
    )
    parser.add_argument("--out", help=".npz file for the embeddings: `image` [B, E], `text` [C, E]")
    found = parser.parse_args(args)
    if found.classes is not None and (found.text or found.out or found.full_depth):
        parser.error(
            "--classes tells what pictures are of; --text, --out and --full-depth are of embeddings, ask apart"
        )
    if not found.image and (not found.text or found.classes is not None):
        parser.error("give an --image" + ("" if found.classes is not None else " or a --text"))
    return found


def _classify(engine: EmbedEngine, paths: Sequence[str], file: str) -> None:
    """Print the five likeliest classes of each picture."""
    lines = Path(file).read_text(encoding="utf-8").splitlines() if file else engine.policy.classes
    classes = [line.strip() for line in lines if line.strip()]
    if file and not classes:
        raise ValueError(f"{file} names no class; give one a line.")
    probabilities_BC = engine.classify(read_pictures(paths), classes or None)
    _print_best(paths, classes, probabilities_BC.tolist(), ".3f", 5)


def _print_best(paths: Sequence[str], words: Sequence[str], scores_BC: list[list[float]], form: str, most: int) -> None:
    """Print the best scored words of each picture."""
    for path, row in zip(paths, scores_BC, strict=True):
        print(path)
        for score, word in sorted(zip(row, words, strict=True), reverse=True)[:most]:
            print(f"  {score:{form}}  {word}")
