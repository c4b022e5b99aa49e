"""Side by side: the same samples answered by the plain model, every static decoder depth and the calibrated policy.

Quality comes from the whole test data, in batches; time from some of it, one sample at a time, all variants in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor, nn

from lightning_mue.callbacks.batches import single
from lightning_mue.exits import attached
from lightning_mue.inference import ExitEngine
from lightning_mue.inference.compare import Timing, compare, engine_variant, transformers_variant
from lightning_mue.metrics.answers import score
from lightning_mue.policy import ExitPolicy, ExitRule
from lightning_mue.report import Row

PLAIN, FULL, FIRST, CALIBRATED = (
    "transformers, full depth",
    "engine, full depth",
    "all at first exit",
    "calibrated exits",
)


@dataclass
class SideBySide:
    """What was measured.

    Args:
        rows: the table.
        depths: stream -> exit depths of the calibrated policy over the test data.
        levels: difficulty of each test sample.
        ceiling: the row of "everything at its first exit".
    """

    rows: list[Row]
    depths: dict[str, np.ndarray]
    levels: np.ndarray
    ceiling: Row


def side_by_side(
    model: nn.Module,
    policy: ExitPolicy,
    datamodule: Any,
    metric: str,
    timed_samples: int = 60,
    repeats: int = 3,
    progress: bool = True,
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
    """
    engines = {name: ExitEngine(model, p, check_fingerprint=False) for name, p in _policies(model, policy).items()}
    end_id = engines[FULL].backbone.decode_settings(None).end_ids[0]
    prefix_fn = datamodule.answer_constraint(end_id)
    variants: dict[str, Callable[[dict[str, Any]], Tensor]] = {PLAIN: transformers_variant(model, None, prefix_fn)}
    variants |= {name: engine_variant(engine, None, prefix_fn) for name, engine in engines.items()}
    with Progress(disable=not progress) as bars:
        batches = list(datamodule.test_dataloader())
        bar = bars.add_task("quality", total=len(batches) * len(variants))
        quality, depths = _quality(variants, engines, batches, datamodule, metric, lambda: bars.advance(bar))
        singles = _singles(batches, timed_samples)
        bar = bars.add_task("time, one sample after the other", total=len(singles) * repeats)
        timings = compare(variants, singles, repeats, baseline=FULL, on_done=lambda *_: bars.advance(bar))
    rows = [_row(name, quality[name], timings[name], depths.get(name, {})) for name in variants]
    levels = np.array([level for batch in batches for level in batch["level"]])
    ceiling = next(row for row in rows if row.name == FIRST)
    return SideBySide(rows, {s: _join(d) for s, d in depths[CALIBRATED].items()}, levels, ceiling)


def first_exits(model: nn.Module) -> ExitPolicy:
    """Return the control: every stream left at its first exit."""
    exits = attached(model)
    layers = exits.layers if exits is not None else {}
    return ExitPolicy({stream: ExitRule.static(ks[0]) for stream, ks in layers.items()})


def _policies(model: nn.Module, policy: ExitPolicy) -> dict[str, ExitPolicy]:
    exits = attached(model)
    decoder = exits.layers.get("decoder", ()) if exits is not None else ()
    static = {f"static decoder depth {k}": ExitPolicy({"decoder": ExitRule.static(k)}) for k in decoder}
    return {FULL: ExitPolicy.full_depth(), **static, FIRST: first_exits(model), CALIBRATED: policy}


def _quality(
    variants: Mapping[str, Callable[[dict[str, Any]], Tensor]],
    engines: Mapping[str, ExitEngine],
    batches: list[dict[str, Any]],
    datamodule: Any,
    metric: str,
    done: Callable[[], object],
) -> tuple[dict[str, float], dict[str, dict[str, list[Tensor]]]]:
    """Return variant -> mean score, and variant -> stream -> depths of each batch."""
    quality: dict[str, float] = {}
    depths: dict[str, dict[str, list[Tensor]]] = {}
    for name, answer in variants.items():
        scores: list[float] = []
        for batch in batches:
            if name in engines:
                end_id = engines[name].backbone.decode_settings(None).end_ids[0]
                output = engines[name].generate(None, datamodule.answer_constraint(end_id), **batch)
                sequences = output.sequences
                for stream, depth in output.exit_depths.items():
                    depths.setdefault(name, {}).setdefault(stream, []).append(depth.cpu())
            else:
                sequences = answer(batch)
            texts = datamodule.processor.decode(sequences[:, 1:])
            scores += [score(metric, t, refs) for t, refs in zip(texts, batch["references"], strict=True)]
            done()
        quality[name] = float(np.mean(scores))
    return quality, depths


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


def _row(name: str, quality: float, timing: Timing, depths: Mapping[str, list[Tensor]]) -> Row:
    means = {}
    for stream, parts in depths.items():
        values = torch.cat([p.flatten() for p in parts])
        means[stream] = float(values[values > 0].float().mean())
    return Row(
        name,
        quality,
        timing.p50_ms,
        timing.p95_ms,
        timing.ratio,
        timing.ratio_spread,
        means,
        chosen=name == CALIBRATED,
    )


def _join(parts: list[Tensor]) -> np.ndarray:
    """Join batches; decoder depths ``[B, T]`` are padded with 0 to the longest."""
    if parts[0].ndim == 1:
        return torch.cat(parts).numpy()
    longest = max(p.shape[1] for p in parts)
    return torch.cat([torch.nn.functional.pad(p, (0, longest - p.shape[1])) for p in parts]).numpy()
