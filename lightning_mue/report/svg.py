"""From a matplotlib figure to inline SVG that takes its colours and its font from the page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

INK, MUTED, LINE, GOOD, BAD, PAPER = "#010203", "#040506", "#070809", "#0a0b0c", "#0d0e0f", "#101112"
"""Stand-ins: the page has a light and a dark value for each, a picture could have only one."""

_VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", GOOD: "good", BAD: "bad", PAPER: "paper"}

_SETTINGS: Any = {
    "text.parse_math": False,  # a dollar in a name is a dollar
    "svg.fonttype": "none",  # text stays text: sharp, selectable, in the page's font
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "axes.titlecolor": INK,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
}

Draw = Callable[[Figure, bool], None]
"""Draws on an empty figure; True asks for the narrow form."""


def inline_svg(draw: Draw, name: str, label: str, wide: tuple[float, float], narrow: tuple[float, float]) -> str:
    """Return two pictures of the same: one for wide screens and one for phones, where shrinking would make text tiny.

    Args:
        draw: called once for each.
        name: makes the ids in the page unique.
        label: read aloud instead of the picture.
        wide: size in inches.
        narrow: size in inches.
    """
    pictures = []
    for form, size in (("wide", wide), ("narrow", narrow)):
        with mpl.rc_context(_SETTINGS | {"svg.hashsalt": f"{name}-{form}"}):
            figure = Figure(figsize=size, layout="constrained")
            draw(figure, form == "narrow")
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        pictures.append(_for_page(buffer.getvalue(), form, label))
    return "\n".join(pictures)


@dataclass(frozen=True)
class Label:
    """A text beside a point, in data coordinates; an optional one is left out where there is no room.

    ``gap`` scales its distance from the point.
    """

    text: str
    x: float
    y: float
    color: str = INK
    bold: bool = False
    optional: bool = True
    gap: float = 1.0


# Offsets in points and alignments, the preferred ones first.
_PLACES = [
    (7, 0, "left", "center"),
    (-7, 0, "right", "center"),
    (0, 7, "center", "bottom"),
    (0, -7, "center", "top"),
    (6, 6, "left", "bottom"),
    (-6, 6, "right", "bottom"),
    (6, -6, "left", "top"),
    (-6, -6, "right", "top"),
]


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
    spots: Any = axes.transData.transform(marks) if marks else []
    taken = [Bbox.from_extents(x - 4, y - 4, x + 4, y + 4) for x, y in spots]
    ends: Any = axes.transData.transform([(x, y) for a, b, y in lines for x in (a, b)]) if lines else []
    taken += [Bbox.from_extents(a[0], a[1] - 1, b[0], b[1] + 1) for a, b in zip(ends[::2], ends[1::2], strict=True)]
    room = axes.get_window_extent().padded(2)
    for label in labels:
        for place in [*_PLACES, None]:
            if place is None and label.optional:
                break
            dx, dy, across, up = place or _PLACES[0]
            text = axes.annotate(
                label.text,
                (label.x, label.y),
                (dx * label.gap, dy * label.gap),
                textcoords="offset points",
                ha=across,
                va=up,
                color=label.color,
                weight="bold" if label.bold else "normal",
                annotation_clip=False,
            )
            box = text.get_window_extent()
            if place is None or (_inside(box, room) and not any(box.overlaps(other) for other in taken)):
                taken.append(box)
                break
            text.remove()


def _inside(box: Bbox, room: Bbox) -> bool:
    return box.x0 >= room.x0 and box.x1 <= room.x1 and box.y0 >= room.y0 and box.y1 <= room.y1


def _for_page(svg: str, form: str, label: str) -> str:
    """Return the picture without what a page does not need, its colours and font as variables."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.S)
    used = set(re.findall(r"(?:href=\"#|url\(#)([^\")]+)", svg))
    # Other ids would repeat from picture to picture; those used hold a hash of the picture's name.
    svg = re.sub(r" id=\"([^\"]*)\"", lambda found: found.group() if found.group(1) in used else "", svg)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.S)
    svg = re.sub(r"font: ((?:\d+ )?[\d.]+px) [^;\"]*", r"font: \1 var(--sans)", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var(--{variable})")
    view_box = re.search(r'viewBox="[^"]*"', svg)
    assert view_box is not None
    xlink = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    head = f'<svg {xlink} class="{form}" role="img" aria-label="{label}" {view_box.group()}>'
    return head + svg[svg.index(">") + 1 :].strip()
