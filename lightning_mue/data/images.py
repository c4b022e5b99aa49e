"""Pictures decoded safely: of the formats that shards may hold, and with the file named when they are broken."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from PIL import Image, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP")
"""Nothing else of what Pillow opens: some of it starts other programs."""
T = TypeVar("T")


def decode(data: bytes, shard: Path, key: str) -> Image.Image:
    """Decodes a picture to RGB.

    Raises:
        ValueError: the bytes are no picture, or only part of one; the message names shard and sample.
    """
    return _with_pillow(lambda file: Image.open(file, formats=FORMATS).convert("RGB"), data, shard, key)


def verify(data: bytes, shard: Path, key: str) -> None:
    """Looks a picture over without decoding it: cheap, and finds most damage.

    Raises:
        ValueError: as ``decode``.
    """
    _with_pillow(lambda file: Image.open(file, formats=FORMATS).verify(), data, shard, key)


def _with_pillow(use: Callable[[io.BytesIO], T], data: bytes, shard: Path, key: str) -> T:
    try:
        return use(io.BytesIO(data))
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"sample {key!r} of {shard} has a corrupt picture: {error}") from error
