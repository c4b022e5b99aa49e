"""Plots of exit depths: how many leave where, and whether what is harder leaves later. One panel a stream."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_mue.report.svg import GOOD, LINE, MUTED

Depths = Mapping[str, np.ndarray]
"""Stream name -> exit depths: ``[n]``, or ``[n, T]`` for the decoder, 0 at steps not taken."""


def draw_histograms(figure: Figure, depths: Depths, num_layers: Mapping[str, int], narrow: bool) -> None:
    """Draw the share of samples (decoder: of tokens) that left at each layer; the last bar ran all of them.

    Args:
        figure: empty.
        depths: per stream.
        num_layers: stream name -> layers at full depth.
        narrow: for phones.
    """
    for axes, (stream, of_stream) in zip(_panels(figure, len(depths), narrow), depths.items(), strict=True):
        taken, last = of_stream[of_stream > 0], num_layers[stream]
        share = np.bincount(taken, minlength=last + 1)[1:] / max(1, len(taken))
        layers = np.arange(1, last + 1)
        bars = axes.bar(layers, share, width=0.8, color=[GOOD] * (last - 1) + [LINE])
        texts = [f"{part:.0%}" if part >= 0.005 else "" for part in share]
        axes.bar_label(bars, texts, padding=2, fontsize=8 if last <= 8 else 6.5, color=MUTED)
        mean = taken.mean() if len(taken) else 0.0
        axes.set_title(f"{stream}: mean {mean:.1f} of {last} layers")
        axes.set_xlabel("exit depth (layers)")
        axes.set_ylim(0, max(share.max(), 0.05) * 1.18)
        axes.set_yticks([])
        axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
        axes.set_xlim(0.4, last + 0.6)
        axes.spines["left"].set_visible(False)
        axes.tick_params(length=0)


def draw_levels(
    figure: Figure, depths: Depths, levels: np.ndarray, num_layers: Mapping[str, int], narrow: bool
) -> None:
    """Draw the mean exit depth of the samples of each difficulty level, with two standard errors either side.

    Args:
        figure: empty.
        depths: per stream.
        levels: of the samples, ``[n]``.
        num_layers: stream name -> layers at full depth.
        narrow: for phones.
    """
    steps = np.unique(levels)
    for axes, (stream, of_stream) in zip(_panels(figure, len(depths), narrow), depths.items(), strict=True):
        of_sample = sample_depths(of_stream)
        groups = [of_sample[levels == step] for step in steps]
        means = np.array([group.mean() for group in groups])
        errors = [2 * group.std() / max(1, len(group)) ** 0.5 for group in groups]
        axes.axhline(num_layers[stream], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            "full depth",
            (1, num_layers[stream]),
            (0, 3),
            ("axes fraction", "data"),
            "offset points",
            ha="right",
            color=MUTED,
        )
        axes.errorbar(steps, means, errors, color=GOOD, marker="o", markersize=5, linewidth=1.5, elinewidth=1)
        axes.set_title(f"{stream}: mean exit depth (layers)")
        axes.set_xlabel("difficulty level")
        axes.set_ylim(0, num_layers[stream] * 1.15)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.margins(x=0.08)
        axes.grid(axis="y")
        axes.spines["left"].set_visible(False)
        axes.tick_params(length=0)


def sample_depths(of_stream: np.ndarray) -> np.ndarray:
    """Return one depth a sample, float64 ``[n]``: its own, or the mean over the steps it took."""
    if of_stream.ndim == 1:
        return of_stream.astype(np.float64)
    return of_stream.sum(1) / np.maximum(1, (of_stream > 0).sum(1))


def panel_rows(count: int, narrow: bool) -> int:
    """Return the rows of ``count`` panels: one below the other on phones, else up to three side by side."""
    return count if narrow else -(-count // 3)


def _panels(figure: Figure, count: int, narrow: bool) -> list[Axes]:
    rows = panel_rows(count, narrow)
    panels = list(figure.subplots(rows, -(-count // rows), squeeze=False).flat)
    for axes in panels[count:]:
        axes.set_axis_off()
    return panels[:count]
