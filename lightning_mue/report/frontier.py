"""The plot of what could be had: loss against predicted time."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from lightning_mue.calibration import Proposal, Tested
from lightning_mue.policy import ExitPolicy
from lightning_mue.report.labels import Label, place_labels
from lightning_mue.report.svg import BAD, GOOD, INK, LINE, MUTED, PAPER, frame

_BEYOND = 2.0  # so much of the allowed loss is shown; what uses more is marked at the edge


def draw_frontier(figure: Figure, proposal: Proposal, tests: Sequence[Tested], policy: ExitPolicy) -> None:
    """Draw every candidate: how much of the allowed loss it uses against its predicted time.

    Hollow marks are of the propose split; filled ones, joined to them, were measured on the certify split.

    Args:
        figure: empty.
        proposal: what was proposed.
        tests: what was tested of it.
        policy: the one chosen.
    """
    axes = figure.subplots()
    measured = [test.used for test in tests]
    shown = [min(u, _BEYOND) for u in [*(c.used for c in (*proposal.chain, *proposal.statics)), *measured]]
    low, top = min(0.0, *shown), max(1.2, *shown)
    axes.set_ylim(low - 0.08 * (top - low), top + 0.06 * (top - low))
    times = [c.ms for c in (*proposal.frontier, *proposal.chain, *proposal.statics)]
    span = max(max(times) - min(times), 0.05 * max(times))
    axes.set_xlim(min(times) - 0.07 * span, max(times) + 0.1 * span)
    frame(axes, "share of the allowed loss that is used", "predicted ms per sample")
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
