"""Pictures on disk, as commands are given them."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image


def read_pictures(paths: Sequence[str]) -> list[Image.Image]:
    """Read pictures.

    Raises:
        ValueError: a file that is none.
        FileNotFoundError: there is no such file.
    """
    pictures = []
    for path in paths:
        try:
            pictures.append(Image.open(path).convert("RGB"))
        except FileNotFoundError:
            raise
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow raises all of these
            raise ValueError(f"{path} must be a picture, and it cannot be read as one: {error}") from error
    return pictures
