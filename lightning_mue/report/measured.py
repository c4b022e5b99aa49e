"""The plot of what was measured: quality against time, every variant a mark."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

from lightning_mue.report.labels import Label, place_labels
from lightning_mue.report.svg import BAD, GOOD, INK, LINE, MUTED, PAPER, frame
from lightning_mue.report.table import Row, baseline

_FORMS = {"full depth": ("D", INK), "static": ("s", MUTED), "other": ("o", INK)}
_SHARES = (0.0, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 1.0, 1.01, 1.02, 1.05, 1.1, 1.25, 1.5, 2.0)

Point = tuple[float, float]


def draw_measured(figure: Figure, rows: Sequence[Row], quality: str, keep: float | None = None) -> None:
    """Draw quality against time, and a line through what nothing beats in both.

    Where there is a baseline, both are shares of its own: time as the paired ratio, quality on a scale that is even
    within the allowed loss and logarithmic beyond it, so that what matters is seen from near and nothing is cut off.

    Args:
        figure: empty.
        rows: with quality and time.
        quality: what it is called.
        keep: the share of quality that was promised, or None.
    """
    axes, full = figure.subplots(), baseline(rows)
    if full is not None and full.quality and all(row.ratio is not None for row in rows):
        name = full.label or full.name
        frame(axes, f"{quality} kept, of {name}", f"time ratio to {name}, ± as in the table")
        points = [(row.ratio or 0.0, (row.quality or 0.0) / full.quality - 1) for row in rows]
        spreads = [(row.ratio_spread or 0.0) / 2 for row in rows]
        lines = _scale_shares(axes, keep, [y for _, y in points])
    else:
        frame(axes, quality, "median ms per sample")
        points, spreads, lines = [(row.p50_ms or 0.0, row.quality or 0.0) for row in rows], [0.0] * len(rows), []
        _limit_up(axes, [y for _, y in points], 0.01)
    whiskers = [(x - spread, x + spread, y) for (x, y), spread in zip(points, spreads, strict=True)]
    left, right = min(a for a, _, _ in whiskers), max(b for _, b, _ in whiskers)
    span = max(right - left, 0.1 * right)
    axes.set_xlim(left - 0.07 * span, right + 0.07 * span)
    best = unbeaten(points)
    axes.plot([x for x, _ in best], [y for _, y in best], color=LINE, linewidth=1, zorder=1)
    for row, point, whisker in zip(rows, points, whiskers, strict=True):
        _mark(axes, row, point, whisker)
    labels = [
        Label(row.label or row.name, x, y, GOOD if row.chosen else INK, row.chosen, optional=False)
        for row, (x, y) in zip(rows, points, strict=True)
    ]
    labels.sort(key=lambda label: (not label.bold, -len(label.text)))  # long ones find a place less easily
    across = [(*axes.get_xlim(), y) for y in lines]
    place_labels(axes, labels, points, [*across, *(whisker for whisker in whiskers if whisker[0] < whisker[1])])


def unbeaten(points: Sequence[Point]) -> list[Point]:
    """Return, from fast to slow, the points (time, quality) that are better than all faster ones."""
    kept: list[Point] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if not kept or y > kept[-1][1]:
            kept.append((x, y))
    return kept


def _mark(axes: Axes, row: Row, point: Point, whisker: tuple[float, float, float]) -> None:
    form, color = ("o", GOOD) if row.chosen else _FORMS[row.kind]
    left, right, y = whisker
    axes.plot([left, right], [y, y], color=color, linewidth=1, alpha=0.5, solid_capstyle="butt")
    fill, size = (GOOD, 8.0) if row.chosen else (PAPER, 5.5)
    axes.plot(*point, form, color=color, markerfacecolor=fill, markersize=size, zorder=3 + row.chosen)


def _scale_shares(axes: Axes, keep: float | None, losses: Sequence[float]) -> list[float]:
    """Scale the upright axis, whose values are shares kept less 1; shade less than the promise and return its level."""
    allowed = max(1 - (keep or 0.98), 0.005)
    axes.set_yscale("symlog", linthresh=allowed, linscale=1.0)
    _limit_up(axes, [*losses, -allowed, 0.0], 0.0)
    axes.yaxis.set_major_locator(FixedLocator([share - 1 for share in _SHARES]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{1 + value:.0%}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if keep is None:
        return []
    axes.axhspan(axes.get_ylim()[0], keep - 1, color=BAD, alpha=0.07, linewidth=0)
    axes.axhline(keep - 1, color=BAD, linewidth=1)
    return [keep - 1]


def _limit_up(axes: Axes, values: Sequence[float], least: float) -> None:
    """Limit the upright axis to the values and an eighth of their span on both sides, as it is scaled."""
    scale = axes.yaxis.get_transform()
    low, high = scale.transform(np.array([min(values), max(values)]))
    pad = max(0.12 * (high - low), least)
    axes.set_ylim(*scale.inverted().transform(np.array([low - pad, high + pad])))
