"""The comparison table: one row for each way to answer the same samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table

from lightning_mue.policy import Certificate

NOTHING = "-"


@dataclass(frozen=True)
class Row:
    """One variant, measured; None where nothing was measured.

    Args:
        name: of the variant.
        quality: mean score, in [0, 1].
        p50_ms: median milliseconds per sample.
        p95_ms: 95th percentile.
        ratio: paired time ratio to the baseline, whose own ratio is 1.
        ratio_spread: interquartile range of the ratio over repeats.
        depths: stream name -> mean exit depth.
        note: a few words.
        chosen: whether this is the policy that ships; marked wherever it is shown.
        kind: what sort of variant; plots mark each sort in its own way.
        label: the name in plots, where room is scarce; ``name`` if empty.
    """

    name: str
    quality: float | None = None
    p50_ms: float | None = None
    p95_ms: float | None = None
    ratio: float | None = None
    ratio_spread: float | None = None
    depths: Mapping[str, float] = field(default_factory=dict)
    note: str = ""
    chosen: bool = False
    kind: Literal["full depth", "static", "other"] = "other"
    label: str = ""


def print_table(
    rows: Sequence[Row],
    certificate: Certificate | None,
    title: str,
    quality: str | None = None,
    console: Console | None = None,
) -> None:
    """Print the table and, below it, the promise in plain words.

    Args:
        rows: in the order to print.
        certificate: of the chosen policy, or None.
        title: above the table.
        quality: what the quality is called; default: the metric of the promise.
        console: default: standard output.
    """
    console = console or Console()
    headers, cells = table_cells(rows, quality or quality_name(certificate), joined=True)
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for header in headers:
        is_text = header in ("variant", "note")
        # Headers may break at their spaces; numbers never: a narrow console takes the room from the note.
        longest = max(map(len, [*header.split(), *(line[len(table.columns)] for line in cells)]))
        width = longest if not is_text else min(longest, 16) if header == "variant" else None
        table.add_column(header, justify="left" if is_text else "right", min_width=width)
    for row, line in zip(rows, cells, strict=True):
        table.add_row(*line, style="bold" if row.chosen else None)
    console.print(table)
    console.print(promise(certificate), highlight=False)


def table_markdown(rows: Sequence[Row], quality: str = "quality") -> str:
    """Return the table as Markdown, the chosen row in bold; ``quality`` is the header of that column."""
    headers, cells = table_cells(rows, quality)
    lines = ["| " + " | ".join(headers) + " |"]
    lines.append("| " + " | ".join("---" if h in ("variant", "note") else "---:" for h in headers) + " |")
    for row, line in zip(rows, cells, strict=True):
        escaped = [cell.replace("|", "\\|") for cell in line]
        lines.append("| " + " | ".join(f"**{c}**" if row.chosen and c else c for c in escaped) + " |")
    return "\n".join(lines) + "\n"


def table_cells(rows: Sequence[Row], quality: str, joined: bool = False) -> tuple[list[str], list[list[str]]]:
    """Return headers and cells as text; columns in which nothing was measured are left out.

    Args:
        rows: of the table.
        quality: header of the quality.
        joined: put the depths of all streams into one column, for a narrow console.
    """
    streams = list(dict.fromkeys(stream for row in rows for stream in row.depths))
    columns: dict[str, list[str]] = {
        "variant": [row.name for row in rows],
        quality: [_number(row.quality, "{:.3f}") for row in rows],
        "p50 ms": [_number(row.p50_ms, "{:.1f}") for row in rows],
        "p95 ms": [_number(row.p95_ms, "{:.1f}") for row in rows],
        "time ratio": [ratio_text(row) for row in rows],
    }
    depths = {s: [_number(row.depths.get(s), "{:.1f}") for row in rows] for s in streams}
    if joined and streams:
        columns[f"depth: {'/ '.join(streams)}"] = ["/".join(of_row) for of_row in zip(*depths.values(), strict=True)]
    else:
        columns |= {f"{stream} depth": texts for stream, texts in depths.items()}
    columns["note"] = [row.note for row in rows]
    kept = [name for name, texts in columns.items() if name == "variant" or set(texts) - {NOTHING, ""}]
    return kept, [[columns[name][i] for name in kept] for i in range(len(rows))]


def ratio_text(row: Row) -> str:
    """Return the time ratio with half its interquartile range, such as ``0.41 ± 0.01``."""
    if row.ratio is None:
        return NOTHING
    if row.ratio_spread is None or row.ratio == 1:
        return f"{row.ratio:.2f}"
    return f"{row.ratio:.2f} ± {row.ratio_spread / 2:.2f}"


def baseline(rows: Sequence[Row]) -> Row | None:
    """Return the row that the time ratios refer to."""
    return next((row for row in rows if row.ratio == 1 and not row.chosen), None)


def quality_name(certificate: Certificate | None) -> str:
    """Return what the column of quality is called: the metric of the promise."""
    return certificate.metric.replace("_", " ") if certificate else "quality"


def promise(certificate: Certificate | None) -> str:
    """Return the promise in plain words."""
    return certificate.in_words() if certificate else "No certificate: this policy was not calibrated."


def is_measured(value: float | None) -> bool:
    """Whether there is a number; the mean of no scores is not one."""
    return value is not None and math.isfinite(value)


def _number(value: float | None, form: str) -> str:
    return form.format(value) if is_measured(value) else NOTHING
