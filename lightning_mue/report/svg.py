"""From a matplotlib figure to inline SVG that takes its colours and its font from the page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

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


def frame(axes: Axes, title: str, below: str) -> None:
    """Name the axes; the upright one above it, where it reads without turning the head."""
    axes.set_title(title, color=MUTED)
    axes.set_xlabel(below)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(5))


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
