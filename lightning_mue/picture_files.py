"""Pictures on disk and the words on them, as commands are given them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from lightning_mue.prompt import Word, read_words


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


def read_pages(paths: Sequence[str]) -> list[tuple[Word, ...]]:
    """Read the words of pages; see ``read_words``.

    Raises:
        ValueError: a file that holds none.
        FileNotFoundError: there is no such file.
    """
    pages = []
    for path in paths:
        try:
            pages.append(read_words(json.loads(Path(path).read_text(encoding="utf-8"))))
        except ValueError as error:  # of JSON and of text, too
            raise ValueError(f"{path} must hold the words of a page as JSON: {error}") from error
    return pages
