"""Side by side: the same samples answered by the plain model, static depths, calibrated exits, other methods.

Quality comes from the whole test data, in batches; time from some of it, one sample at a time, all variants in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from rich.progress import Progress
from torch import nn

from lightning_mue.answers import Answers, answer, plain_answers
from lightning_mue.backbones import num_layers, view
from lightning_mue.callbacks.batches import Batch, on_device, rows_of, single
from lightning_mue.exits import attached
from lightning_mue.inference import ExitEngine
from lightning_mue.inference.compare import Timing, compare, engine_variant, transformers_variant
from lightning_mue.methods import STATIC, boldest, families
from lightning_mue.metrics.answers import scorer
from lightning_mue.policy import ExitPolicy, ExitRule
from lightning_mue.report import Row

PLAIN, FULL, FIRST, CALIBRATED = (
    "transformers, full depth",
    "engine, full depth",
    "all at first exit",
    "calibrated exits",
)
TUNING_SAMPLES = 600
"""So many samples of the recipe's *propose* part tune the methods of the literature."""

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
    decode = partial(answer, model, data=datamodule, score=scorer(metric))
    prefix = datamodule.answer_constraint(view(model).decode_settings(None).end_ids[0])
    with Progress(disable=not progress) as bars:
        tuned = _Tuned()
        if methods:
            tuned = _tune(decode, model, policy, _tuning(datamodule) if tuning is None else tuning, bars)
        batches = [on_device(batch, model) for batch in datamodule.test_dataloader()]
        policies = _policies(model, policy, tuned.policies)
        bar = bars.add_task("quality", total=_count(batches) * (1 + len(policies)))
        done = partial(bars.advance, bar)
        plain = transformers_variant(model, None, prefix)
        plain_quality = float(plain_answers(plain, batches, datamodule, scorer(metric), done)[0].mean())
        found = {name: decode(p, batches, done=done) for name, p in policies.items()}
        singles = _singles(batches, timed_samples)
        bar = bars.add_task("time, one sample after the other", total=len(singles) * repeats)
        engines = {name: ExitEngine(model, p, check_fingerprint=False) for name, p in policies.items()}
        variants = {PLAIN: plain} | {name: engine_variant(e, None, prefix) for name, e in engines.items()}
        timings = compare(variants, singles, repeats, baseline=FULL, on_done=lambda *_: bars.advance(bar))
    rows = [_row(PLAIN, plain_quality, {}, timings[PLAIN])]
    for name, answers in found.items():
        rows.append(_row(name, answers.quality, answers.mean_depths, timings[name], tuned.notes.get(name, "")))
    levels = np.array([level for batch in batches for level in batch["level"]])
    ceiling = next(row for row in rows if row.name == FIRST)
    depths = found[CALIBRATED].depths | {"decoder": found[CALIBRATED].decoder_BT}
    return SideBySide(rows, depths, levels, ceiling, tuned.policies, tuned.note)


def first_exits(model: nn.Module) -> ExitPolicy:
    """Return the control: every stream left at its first exit."""
    exits = attached(model)
    layers = exits.layers if exits is not None else {}
    return ExitPolicy({stream: ExitRule.static(ks[0]) for stream, ks in layers.items()})


def _policies(model: nn.Module, policy: ExitPolicy, methods: Mapping[str, ExitPolicy]) -> dict[str, ExitPolicy]:
    exits = attached(model)
    decoder = exits.layers.get("decoder", ()) if exits is not None else ()
    static = {_static(k): ExitPolicy({"decoder": ExitRule.static(k)}) for k in decoder}
    return {FULL: ExitPolicy.full_depth(), **static, FIRST: first_exits(model), **methods, CALIBRATED: policy}


def _static(depth: int) -> str:
    return f"{STATIC} {depth}"


@dataclass
class _Tuned:
    """Methods of the literature: their policies, notes on rows of the table, and a note on all."""

    policies: dict[str, ExitPolicy] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    note: str = ""


def _tune(
    decode: Callable[..., Answers], model: nn.Module, policy: ExitPolicy, tuning: Iterable[Batch], bars: Progress
) -> _Tuned:
    """Find each method's boldest setting that keeps what ``policy`` promises; of the static depths, only say which."""
    exits, backbone = attached(model), view(model)
    if policy.certificate is None:
        raise ValueError("`methods` are tuned to the promise of the calibrated policy; this one has no certificate.")
    if exits is None:
        raise ValueError("The methods compared need exits; call `attach_exits(model, config)` and train them.")
    promise, batches = policy.certificate.promise, [on_device(batch, model) for batch in tuning]
    if not batches:
        raise ValueError("There is no data to tune the methods on; give `tuning`, or more calibration data.")
    steps = backbone.decode_settings(None).max_new_tokens
    methods = families(exits.layers, num_layers(backbone), steps, exits.config.gate)
    bar = bars.add_task("tuning the methods", total=len(methods))
    tuned, least = _Tuned(), promise.least(decode(ExitPolicy.full_depth(), batches).quality)
    kept = f"{promise.keep:.1%}" if promise.keep is not None else f"all but {promise.drop:g}"
    for method, family in methods.items():
        found = boldest(family, lambda p: decode(p, batches).quality, least)
        if method != STATIC:
            tuned.policies[method] = found
            tuned.notes[method] = "" if found.rules else f"at full depth: no setting kept {kept}"
        elif found.rules:
            tuned.notes[_static(found.rules["decoder"].layers[0])] = f"boldest static depth that kept {kept}"
        bars.advance(bar)
    tuned.note = (
        f"Each method of the literature has the boldest setting that kept {kept} of full-depth quality on "
        f"{_count(batches)} samples of the calibration data; unlike the calibrated exits, none is certified."
    )
    return tuned


def _tuning(datamodule: Any) -> list[Batch]:
    """Return batches of about ``TUNING_SAMPLES`` samples of the *propose* part."""
    batches: list[Batch] = []
    for batch in datamodule.val_dataloader():
        proposes = [datamodule.split_of(cluster) == "propose" for cluster in batch["cluster"]]
        if any(proposes):
            batches.append(rows_of(batch, proposes))
        if _count(batches) >= TUNING_SAMPLES:
            break
    return batches


def _count(batches: Iterable[Batch]) -> int:
    return sum(len(batch["sample_id"]) for batch in batches)


def _singles(batches: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Return ``count`` samples, each as a batch of one without padding, spread evenly over the data."""
    sizes = [len(batch["sample_id"]) for batch in batches]
    wanted = np.unique(np.linspace(0, sum(sizes) - 1, count).astype(int))
    starts = np.cumsum([0, *sizes])
    singles = []
    for index in wanted:
        k = int(np.searchsorted(starts, index, side="right")) - 1
        singles.append(single(batches[k], int(index - starts[k])))
    return singles


def _row(name: str, quality: float, depths: dict[str, float], timing: Timing, note: str = "") -> Row:
    is_static = name.startswith(STATIC)
    return Row(
        name,
        quality,
        timing.p50_ms,
        timing.p95_ms,
        timing.ratio,
        timing.ratio_spread,
        depths,
        note,
        chosen=name == CALIBRATED,
        kind="full depth" if name in (PLAIN, FULL) else "static" if is_static else "other",
        label=name.replace(STATIC, "static") if is_static else _LABELS.get(name, ""),
    )
