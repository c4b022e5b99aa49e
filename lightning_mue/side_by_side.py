"""Side by side: the same samples answered by the plain model, static depths, calibrated exits, other methods.

Quality comes from the whole test data, in batches; time from some of it, one sample at a time, all variants in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor, nn

from lightning_mue.backbones import num_layers, view
from lightning_mue.callbacks.batches import Batch, on_device, rows_of, single
from lightning_mue.exits import attached
from lightning_mue.inference import ExitEngine
from lightning_mue.inference.compare import Timing, Variant, compare, engine_variant, transformers_variant
from lightning_mue.methods import STATIC, boldest, families
from lightning_mue.metrics.answers import score
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
        metric: ``exact_match`` or ``accuracy``.
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
    judge = _Judge(model, datamodule, metric)
    with Progress(disable=not progress) as bars:
        tuned = _tune(judge, policy, _tuning(datamodule) if tuning is None else tuning, bars) if methods else _Tuned()
        batches = [on_device(batch, model) for batch in datamodule.test_dataloader()]
        policies = _policies(model, policy, tuned.policies)
        bar = bars.add_task("quality", total=_count(batches) * (1 + len(policies)))
        plain = transformers_variant(model, None, judge.prefix_fn)
        found = {PLAIN: _Judged(judge.quality(plain, batches, lambda n: bars.advance(bar, n)), {})}
        for name, of_variant in policies.items():
            found[name] = judge.decode(of_variant, batches, lambda n: bars.advance(bar, n))
        singles = _singles(batches, timed_samples)
        bar = bars.add_task("time, one sample after the other", total=len(singles) * repeats)
        variants = {PLAIN: plain} | {name: judge.variant(p) for name, p in policies.items()}
        timings = compare(variants, singles, repeats, baseline=FULL, on_done=lambda *_: bars.advance(bar))
    rows = [_row(name, found[name], timings[name], tuned.notes.get(name, "")) for name in variants]
    levels = np.array([level for batch in batches for level in batch["level"]])
    ceiling = next(row for row in rows if row.name == FIRST)
    depths = {stream: _join(parts) for stream, parts in found[CALIBRATED].depths.items()}
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
class _Judged:
    """Mean score, and stream -> depths of each batch."""

    quality: float
    depths: dict[str, list[Tensor]]


class _Judge:
    """Decodes data and scores the answers.

    Args:
        model: the backbone.
        datamodule: gives the processor and the constraint to closed answers.
        metric: scores answers.
    """

    def __init__(self, model: nn.Module, datamodule: Any, metric: str) -> None:
        self.model, self.metric, self._processor = model, metric, datamodule.processor
        self.prefix_fn = datamodule.answer_constraint(view(model).decode_settings(None).end_ids[0])

    def variant(self, policy: ExitPolicy) -> Variant:
        """Return what answers under a policy."""
        return engine_variant(ExitEngine(self.model, policy, check_fingerprint=False), None, self.prefix_fn)

    def decode(self, policy: ExitPolicy, batches: Iterable[Batch], done: Callable[[int], object]) -> _Judged:
        """Decode all batches under a policy; ``done`` is told of each batch's size."""
        engine, depths = ExitEngine(self.model, policy, check_fingerprint=False), dict[str, list[Tensor]]()

        def answer(batch: Batch) -> Tensor:
            output = engine.generate(None, self.prefix_fn, **batch)
            for stream, depth in output.exit_depths.items():
                depths.setdefault(stream, []).append(depth.cpu())
            return output.sequences

        # MuE's published rule judges a batch as one; its own scripts decode one sample at a time.
        alone = any(rule.signal == "flat_similarity" for rule in policy.rules.values())
        return _Judged(self.quality(answer, _alone(batches) if alone else batches, done), depths)

    def quality(self, answer: Variant, batches: Iterable[Batch], done: Callable[[int], object]) -> float:
        """Return the mean score of the answers to all batches."""
        scores: list[float] = []
        for batch in batches:
            texts = self._processor.decode(answer(batch)[:, 1:])
            scores += [score(self.metric, t, refs) for t, refs in zip(texts, batch["references"], strict=True)]
            done(len(texts))
        return float(np.mean(scores))


@dataclass
class _Tuned:
    """Methods of the literature: their policies, notes on rows of the table, and a note on all."""

    policies: dict[str, ExitPolicy] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    note: str = ""


def _tune(judge: _Judge, policy: ExitPolicy, tuning: Iterable[Batch], bars: Progress) -> _Tuned:
    """Find each method's boldest setting that keeps what ``policy`` promises; of the static depths, only say which."""
    exits, backbone = attached(judge.model), view(judge.model)
    if policy.certificate is None:
        raise ValueError("`methods` are tuned to the promise of the calibrated policy; this one has no certificate.")
    if exits is None:
        raise ValueError("The methods compared need exits; call `attach_exits(model, config)` and train them.")
    keep, batches = policy.certificate.keep, [on_device(batch, judge.model) for batch in tuning]
    if not batches:
        raise ValueError("There is no data to tune the methods on; give `tuning`, or more calibration data.")
    steps = backbone.decode_settings(None).max_new_tokens
    methods = families(exits.layers, num_layers(backbone), steps, exits.config.gate)
    bar = bars.add_task("tuning the methods", total=len(methods))

    def quality(policy: ExitPolicy) -> float:
        return judge.decode(policy, batches, lambda _: None).quality

    tuned, least = _Tuned(), keep * quality(ExitPolicy.full_depth())
    for method, family in methods.items():
        found = boldest(family, quality, least)
        if method == STATIC and found is not None:
            tuned.notes[_static(found.rules["decoder"].layers[0])] = f"boldest static depth that kept {keep:.1%}"
        elif method != STATIC:
            tuned.policies[method] = found or family[0]
            tuned.notes[method] = "" if found else f"its safest, which kept less than {keep:.1%}"
        bars.advance(bar)
    tuned.note = (
        f"Each method of the literature has the boldest setting that kept {keep:.1%} of full-depth quality on "
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


def _alone(batches: Iterable[Batch]) -> list[Batch]:
    return [single(batch, row) for batch in batches for row in range(len(batch["sample_id"]))]


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


def _row(name: str, found: _Judged, timing: Timing, note: str) -> Row:
    means = {}
    for stream, parts in found.depths.items():
        values = torch.cat([p.flatten() for p in parts])
        means[stream] = float(values[values > 0].float().mean())
    is_static = name.startswith(STATIC)
    return Row(
        name,
        found.quality,
        timing.p50_ms,
        timing.p95_ms,
        timing.ratio,
        timing.ratio_spread,
        means,
        note,
        chosen=name == CALIBRATED,
        kind="full depth" if name in (PLAIN, FULL) else "static" if is_static else "other",
        label=name.replace(STATIC, "static") if is_static else _LABELS.get(name, ""),
    )


def _join(parts: list[Tensor]) -> np.ndarray:
    """Join batches; decoder depths ``[B, T]`` are padded with 0 to the longest."""
    if parts[0].ndim == 1:
        return torch.cat(parts).numpy()
    longest = max(p.shape[1] for p in parts)
    return torch.cat([torch.nn.functional.pad(p, (0, longest - p.shape[1])) for p in parts]).numpy()
