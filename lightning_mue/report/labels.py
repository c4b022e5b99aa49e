"""Texts beside the points of a plot, placed so that they hide nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_mue.report.svg import INK, MUTED


@dataclass(frozen=True)
class Label:
    """A text beside a point, in data coordinates.

    Where there is no room beside it, an optional one is left out; another is written further off, joined by a line.
    ``gap`` scales its distance from the point.
    """

    text: str
    x: float
    y: float
    color: str = INK
    bold: bool = False
    optional: bool = True
    gap: float = 1.0


Place = tuple[float, float, str, str]
"""Offset from the point, in points of print, and alignment."""
Boxes = np.ndarray
"""``[n, 2, 2]``: lower left and upper right corners, in pixels."""

_BESIDE: list[Place] = [
    (7, 0, "left", "center"),
    (-7, 0, "right", "center"),
    (0, 7, "center", "bottom"),
    (0, -7, "center", "top"),
    (6, 6, "left", "bottom"),
    (-6, 6, "right", "bottom"),
    (6, -6, "left", "top"),
    (-6, -6, "right", "top"),
]
"""The preferred ones first."""

_TURNS = [math.pi * k / 12 for k in (0, 12, 1, -1, 11, -11, 2, -2, 10, -10, 3, -3, 9, -9, 4, -4, 8, -8, 5, -5, 7, -7)]
_FURTHER: list[Place] = [
    (far * math.cos(turn), far * math.sin(turn), "left" if math.cos(turn) >= 0 else "right", "center")
    for far in range(14, 150, 6)
    for turn in _TURNS
]
"""The near ones first, and of those the level ones. What would leave the plot there is moved back into it."""

_TRIES = 6


def place_labels(
    axes: Axes,
    labels: Sequence[Label],
    marks: Sequence[tuple[float, float]],
    lines: Sequence[tuple[float, float, float]] = (),
) -> None:
    """Write each label where it hides no mark, line or other label; the first come have the choice.

    Args:
        axes: with its limits set.
        labels: in order of importance.
        marks: points, in data coordinates, that must stay visible.
        lines: level ones that must stay visible: from x, to x, at y.
    """
    figure = axes.figure
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()  # the layout decides where things are
    spots: Any = axes.transData.transform(np.reshape(marks, (-1, 2)))
    ends: Any = axes.transData.transform(np.array([[(a, y), (b, y)] for a, b, y in lines]).reshape(-1, 2))
    taken = np.concatenate([np.stack([spots - 4, spots + 4], 1), ends.reshape(-1, 2, 2) + np.array([[0, -1], [0, 1]])])
    texts = [_Text(axes, label, figure.dpi / 72) for label in labels]
    for _ in range(_TRIES):
        lost = _search(texts, taken)
        if lost is None:
            break
        texts.insert(0, texts.pop(lost))  # once more, with the first choice for the one that found no room
    for text in texts:
        text.write(axes)


def _search(texts: Sequence[_Text], taken: Boxes) -> int | None:
    """Find a place for each text in turn; return which one that may not be left out found none."""
    lost = None
    for i, text in enumerate(texts):
        text.found = next((found for found in text.places() if not _hides(found, taken, text.spot)), None)
        if text.found is None and not text.label.optional:
            text.found, lost = next(text.places()), i if lost is None else lost
        if text.found is not None:
            taken = np.concatenate([taken, text.found.covers])
    return lost


@dataclass(frozen=True)
class _Found:
    """A place for a text: its two corners there, and points along the line that joins it to its own, in pixels."""

    place: Place
    box: np.ndarray
    join: np.ndarray = field(default_factory=lambda: np.zeros((0, 2)))

    @property
    def covers(self) -> Boxes:
        """The text and its line."""
        return np.concatenate([self.box[None], np.stack([self.join - 1, self.join + 1], 1)])


class _Text:
    """A label to be placed.

    Args:
        axes: where.
        label: which.
        scale: pixels of a point of print.
    """

    def __init__(self, axes: Axes, label: Label, scale: float) -> None:
        self.label, self._scale = label, scale
        self.found: _Found | None = None
        self.spot: Any = axes.transData.transform((label.x, label.y))
        self._room = np.array(axes.get_window_extent())  # beyond it a text would move the layout
        self._text = axes.annotate(
            label.text,
            (label.x, label.y),
            (0, 0),
            textcoords="offset points",
            color=label.color,
            weight="bold" if label.bold else "normal",
            annotation_clip=False,
        )
        self._size = np.array(self._text.get_window_extent().size)

    def places(self) -> Iterator[_Found]:
        """Give where the label may be, in order of preference."""
        low, high = self._room
        for dx, dy, across, up in _BESIDE:
            place = (dx * self.label.gap, dy * self.label.gap, across, up)
            box = self._box(place)
            if (box[0] >= low).all() and (box[1] <= high).all():
                yield _Found(place, box)
        for place in () if self.label.optional else _FURTHER:
            box = self._box(place)
            shift = np.clip(box[0], low, high - self._size) - box[0]
            end = np.clip(self.spot, *(box + shift))
            begin = self.spot + 6 * (end - self.spot) / max(np.hypot(*(end - self.spot)), 6.0)
            dx, dy = shift / self._scale
            yield _Found((place[0] + dx, place[1] + dy, *place[2:]), box + shift, np.linspace(begin, end, 60))

    def write(self, axes: Axes) -> None:
        """Write the label at the place found, or not at all."""
        if self.found is None:
            self._text.remove()
            return
        dx, dy, across, up = self.found.place
        self._text.xyann = (dx, dy)
        self._text.set(ha=across, va=up)
        if len(self.found.join):
            ends = axes.transData.inverted().transform(self.found.join[[0, -1]])
            axes.plot(ends[:, 0], ends[:, 1], color=MUTED, linewidth=0.6, zorder=1)

    def _box(self, place: Place) -> np.ndarray:
        dx, dy, across, up = place
        part = {"left": 0.0, "bottom": 0.0, "center": 0.5, "right": 1.0, "top": 1.0}
        corner = self.spot + self._scale * np.array([dx, dy]) - self._size * np.array([part[across], part[up]])
        return np.array([corner, corner + self._size])


def _hides(found: _Found, taken: Boxes, spot: np.ndarray) -> bool:
    """Whether a text, or the line that joins it, lies over something else than the marks on its own point."""
    low, high = taken[:, 0], taken[:, 1]
    if ((low < found.box[1]) & (high > found.box[0])).all(1).any():
        return True
    is_other = ~((low < spot) & (high > spot)).all(1)
    along = found.join[:, None]
    return bool(((low[is_other] < along) & (high[is_other] > along)).all(2).any())
