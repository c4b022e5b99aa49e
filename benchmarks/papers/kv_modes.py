"""Ways to fill the K/V of skipped layers, at equal time: how much quality each gives for the same milliseconds.

    python -m papers.kv_modes --ckpt_path runs/sroie_lines/last.ckpt --name sroie_lines --metric exact_text

(from the folder ``benchmarks``). Every mode decodes the test data with the same rules, from shy to bold; that gives it
a curve of quality over time, read off at common times (interpolated between settings; each setting is timed in turn
with all others, on the same samples). Nothing is tuned.
Writes ``benchmarks/results/kv_modes_<name>_<date>.md``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from papers.entry import Entry, time_all
from papers.task import Task, arguments
from rich.progress import track
from targets import device, today

from lightning_mue.files import write_text
from lightning_mue.methods import PROBABILITY, in_words, kv_modes
from lightning_mue.policy import ExitPolicy
from lightning_mue.side_by_side import FULL

DIALS = (0.99, 0.95, 0.9, 0.8, 0.6, 0.3)
POINTS = 4
"""Common times at which the curves are read."""


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--signal", default="margin")
    args = parser.parse_args()
    task = Task.load(args)
    modes = kv_modes(task.layers["decoder"], args.signal)
    policies = {
        (mode, dial): family.policy(PROBABILITY.index(dial) + 1) for mode, family in modes.items() for dial in DIALS
    }
    entries = {str(key): Entry(p, task.decode(p)) for key, p in track(policies.items(), "test data")}
    full = ExitPolicy.full_depth()
    entries[FULL] = Entry(full, task.decode(full))
    time_all(task, entries, FULL, args, {})
    curves = {mode: [entries[str((mode, dial))] for dial in DIALS] for mode in modes}
    text = _text(task, args, curves, entries[FULL])
    write_text(Path(__file__).parents[1] / "results" / f"kv_modes_{task.name}_{today()}.md", text)
    print(text)


def _text(task: Task, args: Any, curves: dict[str, list[Entry]], full: Entry) -> str:
    exits, last = task.layers["decoder"], task.last["decoder"]
    return (
        f"# {task.name}: K/V of skipped layers, at equal time\n\n{device()}, {args.threads} thread(s), torch "
        f"{torch.__version__}; {today()}. {len(full.answers.scores)} test samples, {task.metric} at full depth "
        f"{full.answers.quality:.4f}. Rule: {args.signal} at {exits} of {last} decoder layers, everything else at full "
        f"depth. Time: batch 1, {args.timed_samples} samples, {args.repeats} repeats, all settings in turn; ratio to "
        "our engine at full depth, paired. 'beyond n': the nearest n positions exactly, just in time.\n\n"
        f"## Share of full-depth {task.metric} kept, at equal time (interpolated)\n\n{_at_equal_time(curves, full)}\n"
        f"## Every setting\n\n{_settings(curves, full)}"
    )


def _at_equal_time(curves: dict[str, list[Entry]], full: Entry) -> str:
    """Read each mode's curve at times between its slowest and its fastest setting, all modes' alike."""
    ratios = {mode: np.array([_ratio(e) for e in curve]) for mode, curve in curves.items()}
    kept = {mode: np.array([_kept(e, full) for e in curve]) for mode, curve in curves.items()}
    times = np.linspace(min(r.max() for r in ratios.values()), max(r.min() for r in ratios.values()), POINTS)
    lines = ["| K/V of skipped layers | " + " | ".join(f"time {t:.3f}" for t in times) + " |"]
    lines.append("| --- |" + " --- |" * POINTS)
    for mode in curves:
        order = np.argsort(ratios[mode])
        # The best that this mode can do within the time.
        best = np.maximum.accumulate(kept[mode][order])
        lines.append(
            f"| {mode} | " + " | ".join(f"{q:.3f}" for q in np.interp(times, ratios[mode][order], best)) + " |"
        )
    return "\n".join(lines) + "\n"


def _settings(curves: dict[str, list[Entry]], full: Entry) -> str:
    lines = ["| K/V | rule | kept | same output | nominal depth | computed | filled | decoder ms | ratio |"]
    lines.append("| --- |" + " --- |" * 8)
    for mode, curve in curves.items():
        for entry in curve:
            found, spread = entry.answers, entry.timing.ratio_spread if entry.timing else None
            lines.append(
                f"| {mode} | {in_words(entry.policy).split(';')[0]} | {_kept(entry, full):.3f} | "
                f"{found.same(full.answers):.3f} | {found.mean_depths['decoder']:.2f} | {found.computed:.2f} | "
                f"{found.filled:.2f} | {entry.parts['decoder'] if entry.parts else float('nan'):.2f} | "
                f"{_ratio(entry):.3f}{'' if spread is None else f' ± {spread / 2:.3f}'} |"
            )
    return "\n".join(lines) + "\n"


def _kept(entry: Entry, full: Entry) -> float:
    return entry.answers.quality / full.answers.quality


def _ratio(entry: Entry) -> float:
    assert entry.timing is not None
    return entry.timing.ratio


if __name__ == "__main__":
    main()
