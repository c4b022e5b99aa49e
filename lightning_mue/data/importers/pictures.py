"""Pictures on their way into a shard: found, looked through, and resized only where that is asked."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from PIL import Image

from lightning_mue.data.images import FORMATS, decode, verify

_ENDINGS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
Side = Literal["longest", "shortest"]


@dataclass(frozen=True)
class PictureSettings:
    """How pictures are written.

    Args:
        size: pixels of the side that ``side`` names; larger pictures are shrunk to it, and all others, or with None
            all, keep their bytes.
        side: "longest" or "shortest".
        quality: of shrunk JPEG and WebP pictures, 1 to 95; PNG stays PNG.
    """

    size: int | None = None
    side: Side = "longest"
    quality: int = 90

    def plain(self) -> dict[str, Any]:
        """Return what the bytes depend on."""
        return {"size": None} if self.size is None else asdict(self)

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise ValueError(f"`size` must be at least 1 pixel, or left out, got {self.size}")
        if self.side not in ("longest", "shortest"):
            raise ValueError(f'`side` must be "longest" or "shortest", got {self.side!r}')
        if not 1 <= self.quality <= 95:
            raise ValueError(f"`quality` must be from 1 to 95, got {self.quality}")


def locate(folder: Path, image: str) -> Path | None:
    """Return the file of a picture: below the folder as it is named, or in the folder itself; None where neither is."""
    for path in (folder / image, folder / PurePosixPath(image).name):
        if path.is_file():
            return path
    return None


def prepare(file: Path, key: str, settings: PictureSettings) -> tuple[str, bytes]:
    """Return the ending and the bytes of a picture, which can be decoded whole.

    Raises:
        ValueError: it cannot be read; the message names file and key.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ValueError(f"the picture of {key} cannot be read: {error}") from error
    verify(data, file, key)
    picture = decode(data, file, key)
    with Image.open(io.BytesIO(data), formats=FORMATS) as header:
        kind, mode = header.format or "", header.mode
    width, height = fitted(*picture.size, settings)
    if (width, height) == picture.size:
        return _ENDINGS[kind], data
    if mode in ("1", "L"):
        picture = picture.convert("L")
    buffer = io.BytesIO()
    options = {} if kind == "PNG" else {"quality": settings.quality}
    picture.resize((width, height), Image.Resampling.LANCZOS).save(buffer, kind.replace("MPO", "JPEG"), **options)
    return _ENDINGS[kind], buffer.getvalue()


def fitted(width: int, height: int, settings: PictureSettings) -> tuple[int, int]:
    """Return width and height of a picture of the same shape that is no larger than asked."""
    pixels = max(width, height) if settings.side == "longest" else min(width, height)
    if settings.size is None or pixels <= settings.size:
        return width, height
    return max(1, round(width * settings.size / pixels)), max(1, round(height * settings.size / pixels))
