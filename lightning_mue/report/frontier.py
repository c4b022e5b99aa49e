"""Plots of what could be had: predicted loss against predicted time, and measured quality against measured time."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lightning_mue.calibration import Proposal, Tested
from lightning_mue.calibration.losses import tolerance_of
from lightning_mue.policy import ExitPolicy
from lightning_mue.report.svg import BAD, GOOD, INK, LINE, MUTED, PAPER, Label, place_labels
from lightning_mue.report.table import Row

_BEYOND = 2.0  # so much of the allowed loss is shown; what uses more is marked at the edge


def draw_frontier(figure: Figure, proposal: Proposal, tests: Sequence[Tested], policy: ExitPolicy) -> None:
    """Draw every candidate: how much of the allowed loss it uses against its predicted time.

    Hollow marks are predicted; filled ones, joined to them, were measured on the certify split.

    Args:
        figure: empty.
        proposal: what was proposed.
        tests: what was tested of it.
        policy: the one chosen.
    """
    axes = figure.subplots()
    measured = [used_of(test, proposal) for test in tests]
    shown = [min(u, _BEYOND) for u in [*(c.used for c in (*proposal.chain, *proposal.statics)), *measured]]
    low, top = min(0.0, *shown), max(1.2, *shown)
    axes.set_ylim(low - 0.08 * (top - low), top + 0.06 * (top - low))
    times = [c.ms for c in (*proposal.frontier, *proposal.chain, *proposal.statics)]
    span = max(max(times) - min(times), 0.05 * max(times))
    axes.set_xlim(min(times) - 0.07 * span, max(times) + 0.1 * span)
    _frame(axes, "share of the allowed loss that is used", "predicted ms per sample")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.axhspan(1.0, axes.get_ylim()[1], color=BAD, alpha=0.07, linewidth=0)
    axes.axhline(1.0, color=BAD, linewidth=1)
    frontier = sorted(proposal.frontier, key=lambda c: c.ms)
    axes.plot([c.ms for c in frontier], [c.used for c in frontier], ".-", color=LINE, linewidth=1, markersize=4)
    labels = [*_draw_chain(axes, proposal, tests, measured, policy, top), *_draw_statics(axes, proposal, policy, top)]
    marks = [(c.ms, min(c.used, top)) for c in (*proposal.chain, *proposal.statics)]
    marks += [(test.candidate.ms, min(used, top)) for test, used in zip(tests, measured, strict=True)]
    labels.sort(key=lambda label: not label.bold)
    left, right = axes.get_xlim()
    place_labels(axes, labels, marks, [(left, right, 1.0)])


def used_of(test: Tested, proposal: Proposal) -> float:
    """Return the part of the allowed loss that a tested candidate used on the certify split."""
    keep = proposal.keep
    start = 0.0 if proposal.metric == "consistency" else -(1 - keep) / keep * test.score_full_depth
    return (test.result.mean_loss - start) / max(tolerance_of(proposal.metric, keep) - start, 1e-12)


def draw_measured(figure: Figure, rows: Sequence[Row], quality: str) -> None:
    """Draw quality against median time, with a line to the 95th percentile.

    Args:
        figure: empty.
        rows: with quality and time.
        quality: what it is called.
    """
    axes = figure.subplots()
    points = [(row.p50_ms or 0.0, row.quality or 0.0) for row in rows]
    for row, (x, y) in zip(rows, points, strict=True):
        color = GOOD if row.chosen else INK
        if row.p95_ms is not None:
            axes.plot([x, row.p95_ms], [y, y], color=color, linewidth=1, alpha=0.35, solid_capstyle="butt")
        axes.plot(x, y, "o", color=color, markersize=8 if row.chosen else 5)
    low, high = min(y for _, y in points), max(y for _, y in points)
    pad = max(0.12 * (high - low), 0.01)
    axes.set_ylim(low - pad, high + pad)
    axes.set_xlim(0, max(max(row.p95_ms or 0.0, x) for row, (x, _) in zip(rows, points, strict=True)) * 1.05)
    _frame(axes, quality, "ms per sample: dot = median, line to the 95th percentile")
    ordered = sorted(zip(rows, points, strict=True), key=lambda pair: not pair[0].chosen)
    labels = [Label(row.name, x, y, GOOD if row.chosen else INK, row.chosen, not row.chosen) for row, (x, y) in ordered]
    lines = [
        (row.p50_ms or 0.0, row.p95_ms, y) for row, (_, y) in zip(rows, points, strict=True) if row.p95_ms is not None
    ]
    place_labels(axes, labels, points, lines)


def _draw_statics(axes: Axes, proposal: Proposal, policy: ExitPolicy, top: float) -> list[Label]:
    """Draw full depth and every fixed depth; return their names."""
    labels = []
    for static in proposal.statics:
        x, y, is_full = static.ms, min(static.used, top), static.policy.is_full_depth
        form, color = ("D", INK) if is_full else ("^" if static.used > top else "s", MUTED)
        axes.plot(x, y, form, color=color, markerfacecolor=PAPER, markersize=5.5, zorder=3)
        name = static.policy.depths_in_words().replace(": static", "")
        if is_full and policy.is_full_depth:
            name, color = f"{name}, chosen", GOOD
        labels.append(Label(name, x, y, color, bold=is_full, optional=not is_full))
    return labels


def _draw_chain(
    axes: Axes, proposal: Proposal, tests: Sequence[Tested], measured: Sequence[float], policy: ExitPolicy, top: float
) -> list[Label]:
    """Draw the links of the chain, predicted and measured; return what became of them."""
    labels = []
    for i, candidate in enumerate(proposal.chain):
        x, y, color = candidate.ms, min(candidate.used, top), GOOD
        axes.plot(x, y, "o", color=GOOD, markerfacecolor=PAPER, markersize=5.5, zorder=4)
        accepted = tests[i].accepted if i < len(tests) else None
        if accepted is not None:
            predicted, y, color = y, min(measured[i], top), GOOD if accepted else BAD
            axes.plot([x, x], [predicted, y], color=color, linewidth=1, zorder=3)
            axes.plot(x, y, "o" if accepted else "X", color=color, markersize=6, markeredgewidth=0, zorder=5)
        if candidate.policy.rules == policy.rules:
            axes.plot(x, y, "o", color=GOOD, markerfacecolor="none", markersize=12, markeredgewidth=1.5, zorder=5)
            labels.append(Label("chosen", x, y, GOOD, bold=True, optional=False, gap=1.5))
        elif accepted is False:
            labels.append(Label("rejected", x, y, BAD, bold=True, optional=False))
        elif accepted is None and i == len(tests):
            labels.append(Label("not tested", x, y, GOOD))
    return labels


def _frame(axes: Axes, title: str, below: str) -> None:
    """Name the axes; the upright one above it, where it reads without turning the head."""
    axes.set_title(title, color=MUTED)
    axes.set_xlabel(below)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(5))
