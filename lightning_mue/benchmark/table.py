"""A benchmark as tables: what was answered and how fast, where the time goes, where samples and tokens left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from lightning_mue.benchmark.entry import Entry, Ratio
from lightning_mue.benchmark.policies import FIRST
from lightning_mue.benchmark.run import Benchmark

NOTHING = "-"
NOT_STREAMS = ("embed", "layers", "memory", "signals", "head", "total")

MEANING = (
    "Times are end to end, picture to text, all lines in turn on the same samples; ratios are paired by sample, "
    "medians over repeats ± half their interquartile range. A speed-up over `generate` is made of two things, never "
    "mixed: `full depth x`, what our own full depth of the same runtime and precision gains on it (kernels and "
    "precision, no exits), and `exits x`, what leaving early gains on that."
)
PARTS = (
    "Shares of the whole, measured apart from the times above. Signals are the decoder's; those of the streams before "
    "it are in the streams' own. What is missing to 100 % is upkeep: embeddings, lists of rows, copies."
)
LIMITS = (
    "A limit is the time that reading the weights and multiplying with them takes as fast as this machine was seen to "
    "do either, the head in 8 bits; K/V of the memory are read too. Nothing else is counted."
)

Cells = dict[str, list[str]]
"""Header -> a text for each line."""


def main_cells(entries: Sequence[Entry], quality: str, size: int) -> Cells:
    """Return quality, times, ratios, gains and depths."""
    streams = list(dict.fromkeys(stream for entry in entries for stream in entry.depths))
    whose = "ms" if size == 1 else f"ms of {size}"
    cells: Cells = {
        "line": [entry.name for entry in entries],
        quality: [_number(entry.quality, "{:.3f}") for entry in entries],
        f"p50 {whose}": [_number(entry.p50_ms, "{:.2f}") for entry in entries],
        f"p95 {whose}": [_number(entry.p95_ms, "{:.2f}") for entry in entries],
        "of generate": [_ratio(entry.of_generate) for entry in entries],
        "of own full depth": [_ratio(entry.of_full) for entry in entries],
        "full depth x": [_number(entry.full_gain, "{:.2f}") for entry in entries],
        "exits x": [_number(entry.exits_gain, "{:.2f}") for entry in entries],
    }
    cells |= {
        f"{stream} depth": [_number(entry.depths.get(stream), "{:.2f}") for entry in entries] for stream in streams
    }
    return cells | {"note": [entry.note for entry in entries]}


def part_cells(entries: Sequence[Entry]) -> Cells:
    """Return the share of each part, and the multiply-adds, of the lines of our engine."""
    entries = [entry for entry in entries if entry.parts]
    streams = dict.fromkeys(part for entry in entries for part in entry.parts if part not in NOT_STREAMS)
    cells: Cells = {"line": [entry.name for entry in entries]}
    for part in (*streams, "memory", "layers", "signals", "head"):
        cells[part] = [f"{entry.parts.get(part, 0.0) / entry.parts['total']:.1%}" for entry in entries]
    millions = [None if entry.macs is None else entry.macs / 1e6 for entry in entries]
    return cells | {"10^6 MACs an answer": [_number(number, "{:,.1f}") for number in millions]}


def depth_cells(entries: Sequence[Entry], stream: str) -> Cells:
    """Return the share of samples or tokens that left a stream at each depth, of lines that leave it at several."""
    entries = [entry for entry in entries if len(entry.histogram.get(stream, ())) > 1]
    depths = sorted({depth for entry in entries for depth in entry.histogram[stream]})
    cells: Cells = {"line": [entry.name for entry in entries]}
    return cells | {str(k): [f"{entry.histogram[stream].get(k, 0.0):.1%}" for entry in entries] for k in depths}


def markdown(found: Benchmark, title: str, facts: Mapping[str, str], quality: str) -> str:
    """Return the page.

    Args:
        found: the measurements.
        title: of the page.
        facts: what a reader needs to repeat them.
        quality: name of the score.
    """
    text = f"# {title}\n\n" + "".join(f"* {name}: {value}\n" for name, value in facts.items()) + f"\n{MEANING}\n"
    for size, entries in found.entries.items():
        text += f"\n## Batch {size}\n\n{_table(main_cells(entries, quality, size), entries)}\n{ceiling(found, size)}\n"
        text += f"\n{LIMITS}\n\n### Where the time goes\n\n{PARTS}\n\n{_table(part_cells(entries))}"
    entries = next(iter(found.entries.values()))
    text += "\n## Where samples and tokens left\n\nLines not named left at one and the same depth.\n"
    for stream in dict.fromkeys(name for entry in entries for name, at in entry.histogram.items() if len(at) > 1):
        text += f"\n{stream}: share of {'tokens' if stream == 'decoder' else 'samples'} by depth\n\n"
        text += _table(depth_cells(entries, stream))
    text += f"\n{found.note}\n" if found.note else ""
    if found.left_out:
        text += "\nLeft out:\n\n" + "".join(f"* {name}: {why}\n" for name, why in found.left_out.items())
    return text


def ceiling(found: Benchmark, size: int) -> str:
    """Return what leaving everything at its first exit would save, which no policy can pass."""
    entries = {entry.name: entry for entry in found.entries[size]}
    first, full = entries[FIRST], entries[found.full]
    text = f"Ceiling: everything at its first exit takes {_ratio(first.of_full)} of the time of full depth"
    if first.quality is None or not full.quality:
        return f"{text}."
    text += f" and keeps {first.quality / full.quality:.1%} of its quality."
    return text + (
        " Depth hardly matters here, and no saving is to be credited to exits." * (first.quality >= full.quality * 0.99)
    )


def print_main(found: Benchmark, title: str, quality: str, console: Console | None = None) -> None:
    """Print what fits a console: each line's quality, median time, and the two gains."""
    console = console or Console()
    for size, entries in found.entries.items():
        shown = {"line", quality, "of generate", "full depth x", "exits x"}
        cells = main_cells(entries, quality, size)
        cells = {name: texts for name, texts in cells.items() if name in shown or name.startswith("p50")}
        cells["of generate"] = [text.split()[0] for text in cells["of generate"]]
        table = Table(title=f"{title}, batch {size}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for header in cells:
            table.add_column(header, justify="left" if header == "line" else "right")
        for entry, row in zip(entries, zip(*cells.values(), strict=True), strict=True):
            table.add_row(*row, style="bold" if entry.chosen else None)
        console.print(table)
        console.print(f"{ceiling(found, size)}\n", highlight=False)


def _table(cells: Cells, entries: Sequence[Entry] = ()) -> str:
    chosen = {entry.name for entry in entries if entry.chosen}
    lines = [f"| {' | '.join(cells)} |"]
    lines.append(f"| {' | '.join('---' if header in ('line', 'note') else '---:' for header in cells)} |")
    for row in zip(*cells.values(), strict=True):
        escaped = [cell.replace("|", "\\|") for cell in row]
        lines.append(f"| {' | '.join(f'**{c}**' if row[0] in chosen and c else c for c in escaped)} |")
    return "\n".join(lines) + "\n"


def _ratio(value: Ratio | None) -> str:
    if value is None:
        return NOTHING
    ratio, spread = value
    return f"{ratio:.3f}" if not spread else f"{ratio:.3f} ± {spread / 2:.3f}"


def _number(value: float | None, form: str) -> str:
    return NOTHING if value is None else form.format(value)
