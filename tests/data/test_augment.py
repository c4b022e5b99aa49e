import random

import pytest
from PIL import Image, ImageDraw, ImageOps

from lightning_mue.data.augment import augment
from lightning_mue.data.module import ShardsDataModule


def picture():
    image = Image.new("RGB", (80, 32), "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((6, 8, 20, 24), fill="black")
    draw.ellipse((50, 8, 72, 24), fill="red")
    return image


def test_the_draw_alone_decides():
    once, twice, other = (augment(picture(), ["affine", "contrast"], random.Random(s)) for s in (1, 1, 2))
    assert once.tobytes() == twice.tobytes() != other.tobytes()
    assert augment(picture(), [], random.Random(0)).tobytes() == picture().tobytes()


def test_affine_cuts_nothing_off():
    for seed in range(200):
        changed = augment(picture(), ["affine"], random.Random(seed))
        assert changed.size == (80, 32)
        dark = changed.convert("L").point(lambda v: 255 if v < 128 else 0)
        left, top, right, bottom = dark.getbbox()
        # All ink lies within, and at least as large as shrinking by 15 % leaves it.
        assert left > 0
        assert right < 80
        assert right - left > 66 / 1.15 - 4
        assert bottom - top > 16 / 1.15 - 2


def test_flip_mirrors_half_of_them():
    found = [augment(picture(), ["flip"], random.Random(s)).tobytes() for s in range(100)]
    assert set(found) == {picture().tobytes(), ImageOps.mirror(picture()).tobytes()}
    assert 30 < found.count(picture().tobytes()) < 70


def test_an_unknown_one_is_refused():
    with pytest.raises(ValueError, match=r"got \['rotate'\]"):
        ShardsDataModule("shards", "vqa", augment=["rotate"])
