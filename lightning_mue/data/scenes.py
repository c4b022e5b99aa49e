"""The built-in data: procedural pictures of coloured shapes in a 3 x 3 grid, from one shape to crowded ones."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from rich.progress import track

from lightning_mue.data.questions import COLOURS, CURTAIN, SHAPES, Grid, captions, questions, statements
from lightning_mue.data.writer import write_shard
from lightning_mue.files import write_bytes

SAMPLES_PER_SHARD = 1000
GENERATOR = "lightning_mue.scenes/1"

_RGB = {
    "red": (220, 40, 40),
    "green": (40, 190, 60),
    "blue": (60, 90, 240),
    "yellow": (235, 215, 50),
    "purple": (165, 60, 200),
    "cyan": (50, 205, 220),
}
_GREY = (128, 128, 128)
# Splits own disjoint ranges of indices, so that no split ever repeats another's scene whatever their sizes.
_FIRST_INDEX = {"train": 0, "val": 10**9, "test": 2 * 10**9}


@dataclass(frozen=True)
class SceneMix:
    """How easy and hard scenes and questions are mixed.

    Args:
        objects: number of visible objects (1 to 9) -> weight.
        levels: question level (1 to 5) -> weight: 1 the only shape, 2 one of several, 3 a relation, 4 a chain of
            relations, 5 a sequence. A level that a scene does not allow passes its weight to the others.
        questions_per_scene: questions in ``qa``, fewer where the scene does not allow as many.
        statements_per_scene: statements in ``statements``, likewise.
        curtains: probability that a scene with room has one or two curtains.
    """

    objects: Mapping[int, float] = field(
        default_factory=lambda: {1: 3.0, 2: 3.0, 3: 3.0, 4: 2.0, 5: 2.0, 6: 1.0, 7: 1.0, 8: 0.5, 9: 0.5}
    )
    levels: Mapping[int, float] = field(default_factory=lambda: {1: 1.0, 2: 2.0, 3: 3.0, 4: 2.0, 5: 1.0})
    questions_per_scene: int = 4
    statements_per_scene: int = 4
    curtains: float = 0.3

    def __post_init__(self) -> None:
        for name, weights, last in (("objects", self.objects, 9), ("levels", self.levels, 5)):
            wrong = [key for key in weights if key not in range(1, last + 1)]
            if wrong or min(weights.values(), default=0) < 0 or not sum(weights.values()) > 0:
                raise ValueError(
                    f"`{name}` must map numbers from 1 to {last} to weights >= 0, not all zero, got {dict(weights)}"
                )
        if not 0 <= self.curtains <= 1:
            raise ValueError(f"`curtains` must be a probability in [0, 1], got {self.curtains}")
        if self.questions_per_scene < 0 or self.statements_per_scene < 0:
            raise ValueError("`questions_per_scene` and `statements_per_scene` must not be negative")


def scene_sample(
    seed: int, index: int, size: int = 48, mix: SceneMix | None = None
) -> tuple[Image.Image, dict[str, Any]]:
    """Makes scene ``index`` of the endless sequence named by ``seed``.

    Args:
        seed: names the sequence.
        index: which scene of it.
        size: width and height of the picture in pixels, at least 24; a cell is a third of it.
        mix: what is easy and what is hard; ``SceneMix()`` when not given.

    Returns:
        The RGB picture and its shard record: ``id``, ``task``, ``level`` (number of objects), ``refs``, ``qa``,
        ``statements`` and ``grid`` (nine of None, ``[colour, shape]`` or ``"curtain"``, in reading order).

    Raises:
        ValueError: ``size`` is too small to tell shapes apart.
    """
    if size < 24:
        raise ValueError(f"`size` must be at least 24 pixels for shapes to differ, got {size}")
    mix = mix or SceneMix()
    rng = random.Random(f"{GENERATOR}/{seed}/{index}")
    grid = _draw_grid(rng, mix)
    picture = _paint(grid, rng, size)
    record = {
        "id": f"scene-{seed}-{index}",
        "task": "scene",
        "level": sum(isinstance(cell, tuple) for cell in grid),
        "refs": captions(grid),
        "qa": questions(grid, rng, mix.questions_per_scene, mix.levels),
        "statements": statements(grid, rng, mix.statements_per_scene),
        "grid": [list(cell) if isinstance(cell, tuple) else cell for cell in grid],
    }
    return picture, record


def _draw_grid(rng: random.Random, mix: SceneMix) -> Grid:
    count = rng.choices(list(mix.objects), list(mix.objects.values()))[0]
    order = rng.sample(range(9), 9)
    grid: Grid = [None] * 9
    for cell in order[:count]:
        grid[cell] = (rng.choice(COLOURS), rng.choice(SHAPES))
    if rng.random() < mix.curtains:
        for cell in order[count : count + rng.choice((1, 1, 2))]:
            grid[cell] = CURTAIN
    return grid


def _paint(grid: Grid, rng: random.Random, size: int) -> Image.Image:
    background = tuple(rng.randrange(8, 41) for _ in range(3))
    picture = Image.new("RGB", (size, size), background)
    draw = ImageDraw.Draw(picture)
    side = size / 3
    for k, cell in enumerate(grid):
        left, top = (k % 3) * side, (k // 3) * side
        if cell == CURTAIN:
            draw.rectangle((left, top, left + side - 1, top + side - 1), fill=_GREY)
        elif isinstance(cell, tuple):
            radius = side * rng.uniform(0.26, 0.36)
            slack = side / 2 - radius - 1
            middle = (
                left + side / 2 - 0.5 + rng.uniform(-slack, slack),
                top + side / 2 - 0.5 + rng.uniform(-slack, slack),
            )
            fill = tuple(min(255, max(0, value + rng.randrange(-12, 13))) for value in _RGB[cell[0]])
            _shape(draw, cell[1], middle, radius, fill)
    return picture


def _shape(
    draw: ImageDraw.ImageDraw, shape: str, middle: tuple[float, float], radius: float, fill: tuple[int, ...]
) -> None:
    x, y = middle
    if shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    elif shape == "square":
        half = radius * 0.9
        draw.rectangle((x - half, y - half, x + half, y + half), fill=fill)
    elif shape == "triangle":
        draw.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=fill)
    else:
        arm = radius / 3
        draw.rectangle((x - radius, y - arm, x + radius, y + arm), fill=fill)
        draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill=fill)


def write_scenes(
    folder: str | Path,
    samples: int,
    seed: int = 0,
    split: str = "train",
    size: int = 48,
    mix: SceneMix | None = None,
    progress: bool = True,
) -> list[Path]:
    """Writes one split of scenes as WebDataset shards, once: what is there from an equal call is reused.

    Shards are ``<split>-000.tar`` and so on, 1,000 samples each, written aside and renamed; ``index.json`` comes last
    and names the arguments. Train, val and test never share a scene.

    Args:
        folder: where to write; made when missing. It may hold several splits.
        samples: number of pictures.
        seed: names the sequence of scenes.
        split: "train", "val" or "test".
        size: width and height in pixels.
        mix: what is easy and what is hard.
        progress: draw a progress bar.

    Returns:
        The shards in order.

    Raises:
        ValueError: an unknown split, or no samples asked for.
        FileExistsError: the folder holds data that this function did not write.
    """
    if split not in _FIRST_INDEX or samples < 1:
        raise ValueError(
            f"`split` must be one of {sorted(_FIRST_INDEX)} and `samples` >= 1, got {split!r} and {samples}"
        )
    folder, mix = Path(folder), mix or SceneMix()
    folder.mkdir(parents=True, exist_ok=True)
    arguments = json.loads(json.dumps({"samples": samples, "seed": seed, "size": size, "mix": asdict(mix)}))
    shards = [folder / f"{split}-{k:03d}.tar" for k in range(-(-samples // SAMPLES_PER_SHARD))]
    index = _read_index(folder, split)
    entry = index["splits"].pop(split, None)
    if entry and entry["arguments"] == arguments and all(shard.exists() for shard in shards):
        return shards
    write_bytes(folder / "index.json", json.dumps(index, indent=1).encode())
    for stale in folder.glob(f"{split}-*.tar"):
        stale.unlink()
    asked, indices = 0, range(_FIRST_INDEX[split], _FIRST_INDEX[split] + samples)
    for k, shard in enumerate(track(shards, f"scenes {split}", disable=not progress)):
        first = k * SAMPLES_PER_SHARD
        asked += _write(shard, seed, indices[first : first + SAMPLES_PER_SHARD], size, mix)
    names = [shard.name for shard in shards]
    index["splits"][split] = {
        "images": samples,
        "questions": asked,
        "samples": samples,
        "shards": names,
        "arguments": arguments,
    }
    write_bytes(folder / "index.json", json.dumps(index, indent=1).encode())
    return shards


def _read_index(folder: Path, split: str) -> dict[str, Any]:
    path = folder / "index.json"
    index = json.loads(path.read_text()) if path.exists() else {}
    if index.get("generator") == GENERATOR:
        return index
    if index or any(folder.glob(f"{split}-*.tar")):
        raise FileExistsError(
            f"{folder} holds data that {GENERATOR} did not write (see index.json): choose another or empty it"
        )
    return {"name": "scenes", "generator": GENERATOR, "splits": {}}


def _write(shard: Path, seed: int, indices: range, size: int, mix: SceneMix) -> int:
    """Writes one shard of scenes; returns the number of their questions."""
    asked = 0

    def samples() -> Iterator[tuple[str, str, bytes, dict[str, Any]]]:
        nonlocal asked
        for index in indices:
            picture, record = scene_sample(seed, index, size, mix)
            asked += len(record["qa"])
            png = io.BytesIO()
            picture.save(png, "PNG", compress_level=1)
            yield record["id"], "png", png.getvalue(), record

    write_shard(shard, samples())
    return asked
