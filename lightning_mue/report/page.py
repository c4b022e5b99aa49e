"""The page: everything a run found, in one file that needs nothing else."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np

from lightning_mue.calibration import Proposal, Tested
from lightning_mue.files import write_text
from lightning_mue.policy import ExitPolicy
from lightning_mue.report.depths import Depths, draw_histograms, draw_levels, panel_rows
from lightning_mue.report.frontier import draw_frontier
from lightning_mue.report.measured import draw_measured
from lightning_mue.report.pictures import ShownAnswer, depth_css, pictures_html
from lightning_mue.report.style import CSS
from lightning_mue.report.svg import Draw, inline_svg
from lightning_mue.report.table import Row, baseline, is_measured, promise, quality_name, ratio_text, table_cells

_MARKS = {
    "ring": '<circle cx="6" cy="6" r="4" fill="none" stroke="var(--good)" stroke-width="1.5"/>',
    "disc": '<circle cx="6" cy="6" r="4.5" fill="var(--good)"/>',
    "black ring": '<circle cx="6" cy="6" r="4" fill="none" stroke="var(--ink)" stroke-width="1.5"/>',
    "cross": '<path d="M2 2 10 10M10 2 2 10" stroke="var(--bad)" stroke-width="3"/>',
    "square": '<rect x="2" y="2" width="8" height="8" fill="none" stroke="var(--muted)" stroke-width="1.5"/>',
    "triangle": '<path d="M6 1.5 11 10H1Z" fill="none" stroke="var(--muted)" stroke-width="1.5"/>',
    "diamond": '<path d="M6 1 11 6 6 11 1 6Z" fill="none" stroke="var(--ink)" stroke-width="1.5"/>',
    "line": '<path d="M0 6H12" stroke="var(--line)" stroke-width="1.5"/>',
    "tint": '<path d="M0 0H12V11H0Z" fill="var(--bad)" fill-opacity=".15"/><path d="M0 11H12" stroke="var(--bad)"/>',
}
_FRONTIER_KEY = {
    "ring": "proposed, as predicted",
    "disc": "tested and accepted, as measured",
    "cross": "tested and rejected, as measured",
    "square": "a fixed depth",
    "triangle": "beyond the picture",
    "diamond": "full depth",
    "tint": "more than the promise allows",
}
_MEASURED_KEY = {
    "disc": "calibrated exits",
    "diamond": "full depth",
    "square": "a fixed depth",
    "black ring": "other exits",
    "line": "nothing is both faster and better",
}


def write_html(
    path: str | os.PathLike[str],
    title: str,
    rows: Sequence[Row],
    policy: ExitPolicy,
    *,
    quality: str | None = None,
    proposal: Proposal | None = None,
    tests: Sequence[Tested] = (),
    depths: Depths | None = None,
    num_layers: Mapping[str, int] | None = None,
    levels: np.ndarray | None = None,
    ceiling: Row | None = None,
    pictures: Sequence[ShownAnswer] = (),
    note: str = "",
    settings: Mapping[str, object] | None = None,
) -> Path:
    """Write the report; what is not given is left out of the page. The same inputs give the same bytes.

    Args:
        path: of the page.
        title: of the page.
        rows: the table; the one marked ``chosen`` is set off.
        policy: the one chosen, with its certificate.
        quality: what the quality is called; default: the metric of the promise.
        proposal: what was proposed.
        tests: what was tested of it.
        depths: stream name -> exit depths, ``[n]``, or ``[n, T]`` for the decoder (0 at steps not taken).
        num_layers: stream name -> layers at full depth; else those of the proposal, or the deepest seen.
        levels: difficulty of each sample, ``[n]``.
        ceiling: what would be if everything left at its first exit.
        pictures: answers of the chosen policy to show, with pictures that may be published.
        note: on the table: what a reader must know beside it.
        settings: device, threads, numbers of samples, versions, seed; never the name of a host.

    Returns:
        The path.

    Raises:
        ValueError: depths and levels of different numbers of samples.
    """
    layers = _layers(depths or {}, pictures, num_layers, proposal)
    sections = [_promise(policy), _headline(rows), _measured(rows, policy, quality, note)]
    if pictures:
        sections.append(_pictures(pictures, layers))
    if proposal is not None:
        sections.append(_frontier(proposal, tests, policy))
    if depths:
        sections += _depths(depths, layers, levels)
    if ceiling is not None:
        sections.append(_ceiling(ceiling))
    if settings:
        sections.append(_settings(settings))
    style = CSS + (depth_css(layers["decoder"]) if pictures else "")
    body = "\n".join(section for section in sections if section)
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n"
        f"<body>\n<main>\n<h1>{escape(title)}</h1>\n{body}\n</main>\n</body>\n</html>\n"
    )
    write_text(path, page)
    return Path(path)


def _promise(policy: ExitPolicy) -> str:
    kind = policy.certificate.kind if policy.certificate else "not calibrated"
    weak = "" if kind == "certified" else " weak"
    return (
        f'<section class="promise{weak}"><span class="badge">{escape(kind)}</span>'
        f"<p>{escape(promise(policy.certificate))}</p><p>Policy: {escape(policy.depths_in_words())}.</p></section>"
    )


def _headline(rows: Sequence[Row]) -> str:
    """Return the few numbers of the chosen row that most readers came for."""
    chosen = next((row for row in rows if row.chosen), None)
    if chosen is None:
        return ""
    full = baseline(rows)
    facts: dict[str, str] = {}
    if chosen.ratio is not None and full is not None:
        facts[f"of the time of {full.name}"] = f"{chosen.ratio:.0%}"
    if chosen.p50_ms is not None:
        facts["ms per sample (median)"] = f"{chosen.p50_ms:.1f}"
    if chosen.quality is not None and full is not None and full.quality:
        facts[f"of the quality of {full.name}"] = f"{chosen.quality / full.quality:.1%}"
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    return f'<dl class="headline">{items}</dl>' if items else ""


def _measured(rows: Sequence[Row], policy: ExitPolicy, quality: str | None, note: str) -> str:
    if not rows:
        return ""
    promised, metric = policy.certificate, quality_name(policy.certificate)
    quality = quality or metric
    headers, cells = table_cells(rows, quality)
    kinds = [' class="text"' if header in ("variant", "note") else "" for header in headers]
    head = "".join(f"<th{kind}>{escape(text)}</th>" for kind, text in zip(kinds, headers, strict=True))
    lines = []
    for row, line in zip(rows, cells, strict=True):
        tds = "".join(f"<td{kind}>{escape(text)}</td>" for kind, text in zip(kinds, line, strict=True))
        lines.append(f'<tr class="chosen">{tds}</tr>' if row.chosen else f"<tr>{tds}</tr>")
    table = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    about = (
        "Same weights, same samples, greedy decoding, one run in turn. Time ratio: median over samples of the time on "
        f"the same sample in the same turn, ± half the interquartile range over repeats. {note}"
    )
    text = f'<h2>Measured</h2>{table}<p class="small">{escape(about.strip())}</p>'
    plotted = [row for row in rows if is_measured(row.quality) and is_measured(row.p50_ms)]
    if len(plotted) < 2:
        return text
    keep = promised.promise.keep if promised is not None and quality == metric != "consistency" else None
    key = _MEASURED_KEY | ({} if keep is None else {"tint": f"keeps less than {keep:.1%}"})
    high = 0.13 * len(plotted)
    return text + _figure(
        lambda figure, _: draw_measured(figure, plotted, quality, keep),
        "measured",
        f"{quality} against time per sample; the numbers are in the table",
        _key(key),
        (7.2, 2.5 + high),
        (3.7, 2.5 + 1.5 * high),
    )


def _pictures(shown: Sequence[ShownAnswer], num_layers: Mapping[str, int]) -> str:
    return f"<h2>What it looks like</h2>{pictures_html(shown, num_layers)}"


def _key(marks: Mapping[str, str]) -> str:
    """Return what marks of a plot mean: name of the mark -> meaning."""
    items = (
        f'<li><svg viewBox="0 0 12 12" aria-hidden="true">{_MARKS[m]}</svg>{text}</li>' for m, text in marks.items()
    )
    return f'<ul class="key">{"".join(items)}</ul>'


def _frontier(proposal: Proposal, tests: Sequence[Tested], policy: ExitPolicy) -> str:
    accepted = sum(test.accepted for test in tests)
    tested = (
        f"{len(tests)} of the {len(proposal.chain)} proposed policies were decoded for real on samples not used "
        f"before, from safe to bold; {accepted} passed and the first failure ends the test. Rejected means not proven: "
        "such a mark may lie under the line."
        if tests
        else f"{len(proposal.chain)} policies were proposed; none was tested."
    )
    caption = (
        "Left is faster, low is closer to the full-depth model; at 100% the promise is only just kept. "
        f"{tested} A mark joined to another shows how far the data that proposed was off. "
        "Thin line: the best of those decoded there."
    )
    figure = _figure(
        lambda figure, _: draw_frontier(figure, proposal, tests, policy),
        "frontier",
        "loss used against predicted milliseconds for every candidate policy",
        f"{_key(_FRONTIER_KEY)}{escape(caption)}",
        (7.2, 4.2),
        (3.7, 4.2),
    )
    return f"<h2>How the policy was chosen</h2>{figure}"


def _depths(depths: Depths, num_layers: Mapping[str, int], levels: np.ndarray | None) -> list[str]:
    high, rows = 1.75 * len(depths), panel_rows(len(depths), narrow=False)
    histograms = _figure(
        lambda figure, narrow: draw_histograms(figure, depths, num_layers, narrow),
        "depths",
        "histograms of exit depth for each stream",
        "Share of samples (decoder: of tokens) that left after each layer; the grey bar ran all layers of its stream.",
        (7.2, 2.1 * rows),
        (3.7, high),
    )
    sections = [f"<h2>Where they leave</h2>{histograms}"]
    if levels is None:
        return sections
    levels = np.asarray(levels)
    for stream, of_stream in depths.items():
        if len(of_stream) != len(levels):
            raise ValueError(
                f"`levels` must name one level a sample: got {len(levels)} for {len(of_stream)} of {stream!r}"
            )
    counts = [int((levels == level).sum()) for level in np.unique(levels)]
    plot = _figure(
        lambda figure, narrow: draw_levels(figure, depths, levels, num_layers, narrow),
        "levels",
        "mean exit depth against difficulty level for each stream",
        f"Bars: two standard errors. {min(counts)} to {max(counts)} samples a level.",
        (7.2, 2.3 * rows),
        (3.7, high),
    )
    return [*sections, f"<h2>Do harder samples leave later?</h2>{plot}"]


def _layers(
    depths: Depths, shown: Sequence[ShownAnswer], given: Mapping[str, int] | None, proposal: Proposal | None
) -> dict[str, int]:
    """Return stream name -> layers at full depth, from the best source there is."""
    layers = {stream: int(of_stream.max()) for stream, of_stream in depths.items()}
    for answer in shown:
        for stream, depth in {**answer.stream_depths, "decoder": max(answer.depths, default=1)}.items():
            layers[stream] = max(layers.get(stream, 1), depth)
    if proposal is not None:
        layers |= {s: round(depth) for s, depth in proposal.full_depth.depths.items() if s in layers}
    return layers | {stream: last for stream, last in (given or {}).items() if stream in layers}


def _ceiling(ceiling: Row) -> str:
    facts = []
    if ceiling.p50_ms is not None:
        facts.append(f"{ceiling.p50_ms:.1f} ms per sample")
    if ceiling.ratio is not None:
        facts.append(f"a time ratio of {ratio_text(ceiling)}")
    if ceiling.quality is not None:
        facts.append(f"a quality of {ceiling.quality:.3f}")
    text = (
        f"If everything left at its first exit: {', '.join(facts)}. No policy over these exits can be faster; what "
        "always runs (embeddings, the parts before and after the exits, the vocabulary head) takes the rest. "
        f"{ceiling.note}"
    )
    return f"<h2>The ceiling</h2><p>{escape(text.strip())}</p>"


def _settings(settings: Mapping[str, object]) -> str:
    items = "".join(f"<dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd>" for k, v in settings.items())
    return f'<h2>Setting</h2><dl class="setting">{items}</dl>'


def _figure(
    draw: Draw, name: str, label: str, caption: str, wide: tuple[float, float], narrow: tuple[float, float]
) -> str:
    pictures = inline_svg(draw, name, escape(label, quote=True), wide, narrow)
    return f"<figure>{pictures}{f'<figcaption>{caption}</figcaption>' if caption else ''}</figure>"
