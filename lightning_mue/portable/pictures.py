"""From pictures to pixel values with numpy alone, to the bit as transformers' processors do it through torchvision.

They resize in integers: the weights of a filter have 16 bits, and each of the two passes rounds to 8. Pillow's own
resize rounds otherwise, so it is not used; Pillow only reads pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

Array = np.ndarray
PROCESSORS = tuple(f"{name}ImageProcessor" for name in ("CLIP", "Detr", "ViT", "DeiT", "Blip"))
_MOST_BITS, _LARGEST = 22, 1 << 15


class Pictures:
    """Makes pixel values of pictures.

    Args:
        settings: of transformers' image processor, as it saves them.

    Raises:
        ValueError: a processor or a setting that this does not do.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        _check(settings)
        self._settings, size = settings, settings["size"]
        self._keeps_aspect = "max_height" in size
        resized = (size.get("max_height", size.get("height")), size.get("max_width", size.get("width")))
        padded = settings.get("pad_size") if settings.get("do_pad") else None
        self.size: tuple[int, int] = resized if padded is None else (padded["height"], padded["width"])
        self._resized, self._filter = resized, _FILTERS[settings["resample"]]
        self._add, self._scale = _affine(settings)

    def __call__(self, images: Sequence[Image.Image]) -> Array:
        """Return ``pixel_values [B, 3, H, W]``, float32."""
        pixels_B3HW = np.zeros((len(images), 3, *self.size), np.float32)
        for pixels_3HW, image in zip(pixels_B3HW, images, strict=True):
            x_HW3 = np.asarray(image.convert("RGB"))
            height, width = self._resized_to(*x_HW3.shape[:2])
            x_HW3 = resize(x_HW3, height, width, self._filter).astype(np.float32)
            pixels_3HW[:, :height, :width] = ((x_HW3 - self._add) / self._scale).transpose(2, 0, 1)
        return pixels_B3HW

    def _resized_to(self, height: int, width: int) -> tuple[int, int]:
        if not self._keeps_aspect:
            return self._resized
        scale = min(self._resized[0] / height, self._resized[1] / width)
        found = int(height * scale), int(width * scale)
        if 0 in found:
            raise ValueError(f"A picture of {height} x {width} pixels is too narrow for {self._resized}; cut it")
        return found


def resize(x_HWC: Array, height: int, width: int, kind: str) -> Array:
    """Return a picture of bytes in another size.

    Args:
        x_HWC: uint8.
        height: of the result.
        width: of the result.
        kind: ``bilinear`` or ``bicubic``; where the result is smaller the filter widens.
    """
    if width != x_HWC.shape[1]:
        x_HWC = _resize_rows(x_HWC.swapaxes(0, 1), width, kind).swapaxes(0, 1)
    return x_HWC if height == x_HWC.shape[0] else _resize_rows(x_HWC, height, kind)


def _resize_rows(x_HWC: Array, rows: int, kind: str) -> Array:
    first_N, weight_NK, bits = _taps(len(x_HWC), rows, kind)
    sum_NWC = np.full((rows, *x_HWC.shape[1:]), 1 << (bits - 1), np.int32)  # a half: what is cut off then rounds
    for k in range(weight_NK.shape[1]):
        source_N = np.minimum(first_N + k, len(x_HWC) - 1)  # beyond the edge the weight is 0
        sum_NWC += weight_NK[:, k, None, None] * x_HWC[source_N]
    return (sum_NWC >> bits).clip(0, 255).astype(np.uint8)


def _taps(size: int, result: int, kind: str) -> tuple[Array, Array, int]:
    """Return the first source of each result, int weights ``[N, K]`` of it and of those after it, and their bits."""
    reach, weigh = _KERNELS[kind]
    scale = size / result
    stretch = max(scale, 1.0)
    center_N = scale * (np.arange(result) + 0.5)
    first_N = np.maximum((center_N - reach * stretch + 0.5).astype(np.int64), 0)
    last_N = np.minimum((center_N + reach * stretch + 0.5).astype(np.int64), size)
    source_NK = first_N[:, None] + np.arange((last_N - first_N).max())
    weight_NK = weigh(np.abs(source_NK - center_N[:, None] + 0.5) / stretch) * (source_NK < last_N[:, None])
    weight_NK /= weight_NK.sum(1, keepdims=True)
    bits = max(n for n in range(1, _MOST_BITS + 1) if n == 1 or int(0.5 + weight_NK.max() * (1 << n)) < _LARGEST)
    scaled_NK = weight_NK * (1 << bits)
    return first_N, np.trunc(scaled_NK + np.copysign(0.5, scaled_NK)).astype(np.int32), bits


def _linear(x: Array) -> Array:
    return np.maximum(1 - x, 0)


def _cubic(x: Array) -> Array:
    inner, outer = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    return np.where(x < 1, inner, np.where(x < 2, outer, 0))


_KERNELS = {"bilinear": (1, _linear), "bicubic": (2, _cubic)}
_FILTERS = {2: "bilinear", 3: "bicubic"}
"""Pillow's numbers of filters."""


def _affine(settings: Mapping[str, Any]) -> tuple[Array, Array]:
    """Return what is taken from a byte, and what it is then divided by."""
    add, scale = np.zeros(3, np.float32), np.ones(3, np.float32)
    if settings["do_normalize"]:
        add, scale = (np.array(settings[name], np.float32) for name in ("image_mean", "image_std"))
    if settings["do_rescale"]:
        per_level = np.float32(1.0 / settings["rescale_factor"])
        add, scale = add * per_level, scale * per_level
    return add, scale


def _check(settings: Mapping[str, Any]) -> None:
    size, found = settings["size"], settings["image_processor_type"]
    if found not in PROCESSORS:
        raise ValueError(f"Pictures without transformers are read as {list(PROCESSORS)} read them, got {found!r}")
    if not settings["do_resize"] or not ({"height", "width"} <= {*size} or {"max_height", "max_width"} <= {*size}):
        raise ValueError(f"Pictures must be resized to a height and a width (or within such), got {dict(size)}")
    if "max_height" in size and not (settings.get("do_pad") and settings.get("pad_size")):
        raise ValueError("Pictures that keep their aspect must be padded to one `pad_size`")
    if settings.get("do_center_crop"):
        raise ValueError("Pictures without transformers are not cropped: resize to `height` and `width` instead")
    if settings["resample"] not in _FILTERS:
        raise ValueError(f"`resample` must be one of {_FILTERS}, got {settings['resample']!r}")
