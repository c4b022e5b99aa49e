"""The whole benchmark of a trained model: all lines on the same samples, in one run, in turn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from rich.progress import Progress

from lightning_mue.answers import Answers
from lightning_mue.benchmark.accounting import Accounting
from lightning_mue.benchmark.baselines import PLAIN, baseline_lines
from lightning_mue.benchmark.entry import Entry, entry_of, mean_parts
from lightning_mue.benchmark.exam import PLACE, Exam
from lightning_mue.benchmark.lines import Line, measure
from lightning_mue.benchmark.ours import IDEAL, NO_UPKEEP, OurLines
from lightning_mue.benchmark.policies import CALIBRATED
from lightning_mue.benchmark.tuning import Tuned, tune, tuning_batches
from lightning_mue.callbacks.batches import Batch
from lightning_mue.policy import ExitPolicy

LIMIT = "limit of bytes and FLOPs"


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Args:
        timed_samples: answered by every line in turn.
        repeats: of the timing.
        batch_sizes: of the timing; quality comes from the data's own batches.
        runtime: of the exits; as of `ExitEngine`.
        methods: measure the methods of the papers too.
        compiled: and transformers' compiled model.
        progress: draw progress bars.
    """

    timed_samples: int = 60
    repeats: int = 3
    batch_sizes: tuple[int, ...] = (1,)
    runtime: str | None = None
    methods: bool = False
    compiled: bool = False
    progress: bool = True


@dataclass(frozen=True)
class Benchmark:
    """What was measured.

    Args:
        entries: batch size -> all lines.
        full: name of the calibrated exits' own full depth.
        samples: test samples.
        left_out: line -> why it is not there.
        machine: what the machine does at its best.
        note: how the methods were tuned.
    """

    entries: Mapping[int, Sequence[Entry]]
    full: str
    samples: int
    left_out: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


def benchmark(exam: Exam, policy: ExitPolicy, settings: Settings, tuning: Iterable[Batch] | None = None) -> Benchmark:
    """Measure all lines.

    Args:
        exam: what is answered.
        policy: the calibrated one.
        settings: how.
        tuning: batches to tune the methods of the papers on; part of the calibration data if not given.

    Raises:
        ValueError: the test data has no batch of a size that was asked for, or the methods cannot be tuned.
    """
    picked = {size: exam.picked(settings.timed_samples, size) for size in settings.batch_sizes}
    with Progress(disable=not settings.progress) as bars:
        lines, left_out = baseline_lines(exam, settings.compiled, next(iter(picked.values()))[0])
        ours, tuned = OurLines(exam, policy, settings.runtime), Tuned()
        if settings.methods:
            given = tuning_batches(exam.data) if tuning is None else tuning
            tuned = tune(ours.decode, exam.model, policy, given, bars)
        lines |= ours.lines(tuned)
        bar = bars.add_task("quality", total=len(exam) * len(lines))
        found = {name: line.decode(lambda size: bars.advance(bar, size)) for name, line in lines.items()}
        replays = ours.replays(found)
        found |= {name: line.decode(lambda _: None) for name, (line, _) in replays.items()}
        counts, entries = Accounting(exam, ours.precision), {}
        for size, samples in picked.items():
            able = lines | {name: _checked(exam, line, found[of], samples) for name, (line, of) in replays.items()}
            if size > 1 and policy.groups is not None:
                for name in (IDEAL, NO_UPKEEP):
                    left_out[f"{name}, batch {size}"] = "rows of several groups obey several policies"
                    del able[name]
            entries[size] = [
                *_measured(able, found, samples, settings.repeats, counts, ours.full, bars),
                *(_limit(kind, counts, samples, found[of]) for kind, of in _limits(ours.full)),
            ]
    machine = {"layers": asdict(counts.machine), "head": asdict(counts.head)}
    return Benchmark(entries, ours.full, len(exam), left_out | ours.left_out, machine, tuned.note)


def _checked(exam: Exam, line: Line, answers: Answers, samples: Sequence[Batch]) -> Line:
    """Return a line of known depths with a note that says how many of its answers are those that it repeats."""
    same = size = 0
    for sample in samples:
        said = exam.data.processor.decode(line.answer(sample)[:, 1:])
        same += sum(text == answers.texts[i] for text, i in zip(said, sample[PLACE], strict=True))
        size += len(said)
    return replace(line, note=f"same answers on {same} of {size} timed samples")


def _measured(
    lines: Mapping[str, Line],
    found: Mapping[str, Answers],
    samples: Sequence[Batch],
    repeats: int,
    counts: Accounting,
    full: str,
    bars: Progress,
) -> list[Entry]:
    """Time all lines in turn; then, apart, where the time of each goes."""
    size = len(samples[0][PLACE])
    bar = bars.add_task(f"time, batch {size}", total=len(samples) * repeats)
    variants = {name: line.answer for name, line in lines.items()}
    times = measure(variants, samples, repeats, full, lambda: bars.advance(bar))
    entries = []
    for name, line in bars.track(lines.items(), description=f"parts, batch {size}"):
        known = {"parts": mean_parts(line, samples), "note": line.note, "chosen": name == CALIBRATED}
        if (policy := line.policy) is not None and policy.kv_fill == "just-in-time" and not policy.verified:
            known["macs"] = counts.macs(samples, found[name])
        entries.append(entry_of(name, line, found[name], times, PLAIN, **known))
    return entries


def _limits(full: str) -> tuple[tuple[str, str], ...]:
    """Return what limits are told, and of which line's depths."""
    return (f"{LIMIT}, full depth", full), (f"{LIMIT}, calibrated depths", CALIBRATED)


def _limit(name: str, counts: Accounting, samples: Sequence[Batch], answers: Answers) -> Entry:
    least_ms = counts.least_ms(samples, answers)
    total = [sum(of_batch.values()) for of_batch in least_ms]
    parts = {part: float(np.mean([of_batch[part] for of_batch in least_ms])) for part in least_ms[0]}
    return Entry(
        name,
        p50_ms=float(np.median(total)),
        p95_ms=float(np.percentile(total, 95)),
        depths=answers.mean_depths,
        parts=parts | {"total": float(np.mean(total))},
        macs=counts.macs(samples, answers),
        note=f"{counts.machine.bytes_per_s / 1e9:.0f} GB/s, {counts.machine.macs_per_s / 1e9:.0f} G multiply-adds/s",
    )
