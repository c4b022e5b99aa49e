"""Side by side: the same samples answered by the plain model, static depths, calibrated exits, other methods.

Quality comes from the whole test data, in batches; time from some of it, one sample at a time, all variants in turn.
``lightning_mue.benchmark`` measures the same and much more.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.progress import Progress
from torch import nn

from lightning_mue.answers import Answers, answer
from lightning_mue.benchmark.baselines import PLAIN
from lightning_mue.benchmark.exam import Exam
from lightning_mue.benchmark.lines import engine_line, measure, plain_line
from lightning_mue.benchmark.policies import CALIBRATED, FIRST, FULL, first_exits, static_depths
from lightning_mue.benchmark.tuning import Tuned, tune, tuning_batches
from lightning_mue.callbacks.batches import Batch
from lightning_mue.inference.compare import Timing, transformers_variant
from lightning_mue.methods import STATIC
from lightning_mue.policy import ExitPolicy
from lightning_mue.report import Row

_LABELS = {
    PLAIN: "transformers",
    FULL: "full depth",
    "mue-as-published": "MuE as published",
    "MuE encoder + DEED decoder": "MuE + DEED",
}
"""Short names, for the plot."""


@dataclass
class SideBySide:
    """What was measured.

    Args:
        rows: the table.
        depths: stream -> exit depths of the calibrated policy over the test data.
        levels: difficulty of each test sample.
        ceiling: the row of "everything at its first exit".
        methods: method of the literature -> the policy that was measured.
        note: how they were tuned.
    """

    rows: list[Row]
    depths: dict[str, np.ndarray]
    levels: np.ndarray
    ceiling: Row
    methods: dict[str, ExitPolicy] = field(default_factory=dict)
    note: str = ""


def side_by_side(
    model: nn.Module,
    policy: ExitPolicy,
    datamodule: Any,
    metric: str,
    timed_samples: int = 60,
    repeats: int = 3,
    progress: bool = True,
    methods: bool = False,
    tuning: Iterable[Batch] | None = None,
) -> SideBySide:
    """Measure all variants on ``datamodule.test_dataloader()``.

    Args:
        model: the backbone with its exits.
        policy: the calibrated one.
        datamodule: gives the test data and the processor.
        metric: a name that ``metrics.scorer`` knows.
        timed_samples: answered one at a time by every variant in turn.
        repeats: of the timing.
        progress: draw progress bars.
        methods: measure the methods of the literature too, each at its boldest setting that keeps, on ``tuning``, the
            share of full-depth quality that ``policy`` promises.
        tuning: batches of other data than the test data; some of the recipe's *propose* part if not given.

    Raises:
        ValueError: methods are asked for, and there are no exits, there is no data to tune them, or ``policy`` has no
            certificate that says what to keep.
    """
    exam = Exam.of(model, datamodule, metric)

    def decode(some: ExitPolicy, batches: list[Batch]) -> Answers:
        return answer(model, some, batches, datamodule, exam.score)

    with Progress(disable=not progress) as bars:
        tuned = Tuned()
        if methods:
            given = tuning_batches(datamodule) if tuning is None else tuning
            tuned = tune(decode, model, policy, given, bars)
        policies = {FULL: ExitPolicy.full_depth(), **static_depths(model), FIRST: first_exits(model)}
        policies |= {**tuned.policies, CALIBRATED: policy}
        lines = {PLAIN: plain_line(exam, transformers_variant(model, None, exam.prefix))}
        lines |= {name: engine_line(exam, some) for name, some in policies.items()}
        bar = bars.add_task("quality", total=len(exam) * len(lines))
        found = {name: line.decode(lambda size: bars.advance(bar, size)) for name, line in lines.items()}
        singles = exam.picked(timed_samples)
        bar = bars.add_task("time, one sample after the other", total=len(singles) * repeats)
        variants = {name: line.answer for name, line in lines.items()}
        times = measure(variants, singles, repeats, FULL, lambda: bars.advance(bar))
    rows = [_row(name, answers, times[name].timing, tuned.notes.get(name, "")) for name, answers in found.items()]
    levels = np.array([level for batch in exam.batches for level in batch["level"]])
    ceiling = next(row for row in rows if row.name == FIRST)
    depths = found[CALIBRATED].depths | {"decoder": found[CALIBRATED].decoder_BT}
    return SideBySide(rows, depths, levels, ceiling, tuned.policies, tuned.note)


def _row(name: str, answers: Answers, timing: Timing, note: str) -> Row:
    is_static = name.startswith(STATIC)
    return Row(
        name,
        answers.quality,
        timing.p50_ms,
        timing.p95_ms,
        timing.ratio,
        timing.ratio_spread,
        answers.mean_depths,
        note,
        chosen=name == CALIBRATED,
        kind="full depth" if name in (PLAIN, FULL) else "static" if is_static else "other",
        label=name.replace(STATIC, "static") if is_static else _LABELS.get(name, ""),
    )
