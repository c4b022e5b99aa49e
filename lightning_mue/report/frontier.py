"""Plots of what could be had: predicted loss against predicted time, and measured quality against measured time."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lightning_mue.calibration import Candidate, Proposal, Tested
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
    shown = [min(c.used, _BEYOND) for c in (*proposal.chain, *proposal.statics)] + [min(u, _BEYOND) for u in measured]
    low, top = min(0.0, *shown), min(max(1.2, *shown), _BEYOND)
    axes.set_ylim(low - 0.08 * (top - low), top + 0.06 * (top - low))
    times = [c.ms for c in (*proposal.frontier, *proposal.chain, *proposal.statics)]
    axes.set_xlim(
        min(times) - 0.07 * (max(times) - min(times)) - 1e-9, max(times) + 0.1 * (max(times) - min(times)) + 1e-9
    )
    _frame(axes, "share of the allowed loss that is used", "predicted ms per sample")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.axhspan(1.0, axes.get_ylim()[1], color=BAD, alpha=0.07, linewidth=0)
    axes.axhline(1.0, color=BAD, linewidth=1)
    marks, labels = _marks(axes, proposal, tests, measured, policy, top)
    left, right = axes.get_xlim()
    labels.append(Label("more than the promise allows", right, 1.0, BAD))
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


def _marks(
    axes: Axes,
    proposal: Proposal,
    tests: Sequence[Tested],
    measured: Sequence[float],
    policy: ExitPolicy,
    top: float,
) -> tuple[list[tuple[float, float]], list[Label]]:
    """Draw all candidates; return their points and labels, the most important first."""
    hollow = {"markerfacecolor": PAPER, "linestyle": "none", "markersize": 5.5}
    frontier = sorted(proposal.frontier, key=lambda c: c.ms)
    axes.plot([c.ms for c in frontier], [c.used for c in frontier], ".-", color=LINE, linewidth=1, markersize=4)
    labels: list[Label] = []
    marks: list[tuple[float, float]] = []
    for static in proposal.statics:
        x, y, form = static.ms, min(static.used, top), "D" if static.policy.is_full_depth else "s"
        form = "^" if static.used > top else form
        axes.plot(x, y, form, color=INK if static.policy.is_full_depth else MUTED, zorder=3, **hollow)
        is_full = static.policy.is_full_depth
        labels.append(Label(_name(static), x, y, INK if is_full else MUTED, bold=is_full, optional=not is_full))
        marks.append((x, y))
    for candidate in proposal.chain:
        marks.append((candidate.ms, min(candidate.used, top)))
        axes.plot(*marks[-1], "o", color=GOOD, zorder=4, **hollow)
    for test, used in zip(tests, measured, strict=True):
        x, y, color = test.candidate.ms, min(used, top), GOOD if test.accepted else BAD
        axes.plot([x, x], [min(test.candidate.used, top), y], color=color, linewidth=1, zorder=3)
        axes.plot(x, y, "o" if test.accepted else "X", color=color, markersize=6, markeredgewidth=0, zorder=5)
        marks.append((x, y))
        if test.candidate.policy.rules == policy.rules:
            axes.plot(x, y, "o", color=GOOD, markerfacecolor="none", markersize=12, markeredgewidth=1.5, zorder=5)
            labels.insert(0, Label("chosen", x, y, GOOD, bold=True, optional=False))
        elif not test.accepted:
            labels.insert(0, Label("rejected", x, y, BAD, bold=True, optional=False))
    if len(tests) < len(proposal.chain):
        first = proposal.chain[len(tests)]
        labels.insert(0, Label("not tested", first.ms, min(first.used, top), GOOD))
    return marks, sorted(labels, key=lambda label: not label.bold)


def _name(candidate: Candidate) -> str:
    return candidate.policy.depths_in_words().replace(": static", "")


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
