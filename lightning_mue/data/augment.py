"""Random changes of training samples that leave their labels true."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

from PIL import Image, ImageEnhance, ImageOps

from lightning_mue.data.tokenizer import DIGITS

Augmentation = Literal["affine", "flip", "contrast", "digits"]
AUGMENTATIONS: tuple[Augmentation, ...] = ("affine", "flip", "contrast", "digits")


def augment(image: Image.Image, kinds: Sequence[Augmentation], rng: random.Random) -> Image.Image:
    """Return the picture, changed at random.

    Args:
        image: the picture.
        kinds: ``affine`` shrinks each side by up to 15 %, moves it within the room gained, where the colour of a corner
            fills up, and slants it by up to 10 %; ``flip`` mirrors it half of the time (not for text, nor where left
            and right are asked for); ``contrast`` changes contrast and brightness by up to 30 %.
        rng: draws.
    """
    if "affine" in kinds:
        image = _affine(image, rng)
    if "flip" in kinds and rng.random() < 0.5:
        image = ImageOps.mirror(image)
    if "contrast" in kinds:
        image = ImageEnhance.Contrast(image).enhance(rng.uniform(0.7, 1.3))
        image = ImageEnhance.Brightness(image).enhance(rng.uniform(0.7, 1.3))
    return image


def other_digits(rng: random.Random) -> dict[int, int]:
    """Return a table for ``str.translate`` that exchanges digits; half of the time each stays what it is.

    Whoever finds a number on such a page has not learnt it by heart. The words of the page and the answer change alike;
    the picture does not.
    """
    return str.maketrans(DIGITS, "".join(rng.sample(DIGITS, 10)) if rng.random() < 0.5 else DIGITS)


def _affine(image: Image.Image, rng: random.Random) -> Image.Image:
    width, height = image.size
    across, down, slant = rng.uniform(1.0, 1.15), rng.uniform(1.0, 1.15), rng.uniform(-0.1, 0.1)
    # PIL maps places of the result to places of the picture: what is beyond the picture is the room gained.
    left = -rng.random() * (across - 1) * width - slant * height / 2
    top = -rng.random() * (down - 1) * height
    matrix = (across, slant, left, 0.0, down, top)
    edge = image.getpixel((0, 0))
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=edge)
