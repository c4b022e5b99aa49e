"""One line of a table: what a policy answers, and what that costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from papers.task import Task
from rich.progress import Progress

from lightning_mue.answers import Answers
from lightning_mue.callbacks.batches import Batch, single
from lightning_mue.inference import ExitEngine
from lightning_mue.inference.compare import Timing, Variant, compare, engine_variant
from lightning_mue.policy import ExitPolicy


@dataclass
class Entry:
    """A policy, or known depths replayed under one.

    Args:
        policy: that was obeyed.
        answers: to the test data.
        forced: batch -> row -> depths replayed.
        note: said of it below the table.
        timing: at batch 1.
        head_to_head: timing against one rival alone.
        parts: mean milliseconds of encoder side, decoder, and the signals among the decoder's.
    """

    policy: ExitPolicy
    answers: Answers
    forced: list[Any] | None = None
    note: str = ""
    timing: Timing | None = None
    parts: dict[str, float] | None = None
    head_to_head: Timing | None = None


def time_all(
    task: Task, entries: dict[str, Entry], baseline: str, args: Any, others: dict[str, Variant]
) -> dict[str, Timing]:
    """Time all entries and ``others`` in turn on the same single samples; then, apart, where each one's time goes.

    Returns:
        the timings of ``others``; those of the entries are set.
    """
    samples = _samples(task.test, args.timed_samples)
    engines = {name: ExitEngine(task.model, e.policy, check_fingerprint=False) for name, e in entries.items()}
    first = {_key(e): name for name, e in reversed(entries.items())}  # one timing for one policy
    variants = {
        n: _variant(engines[n], entries[n].forced, task.prefix) for n in entries if first[_key(entries[n])] == n
    }
    timings = _compare(others | variants, samples, args.repeats, baseline)
    for name, entry in entries.items():
        entry.timing = timings[first[_key(entry)]]
        entry.parts = _parts(engines[name], entry.forced, samples, task.prefix)
    return {name: timings[name] for name in others}


def head_to_head(task: Task, ours: ExitPolicy, rival: ExitPolicy, args: Any) -> Timing:
    """Return how ``ours`` fares against ``rival`` alone, paired on the same samples, in three times the repeats."""
    policies = {"rival": rival, "ours": ours}
    variants = {
        n: _variant(ExitEngine(task.model, p, check_fingerprint=False), None, task.prefix) for n, p in policies.items()
    }
    return _compare(variants, _samples(task.test, args.timed_samples), 3 * args.repeats, "rival")["ours"]


def _compare(variants: dict[str, Variant], samples: list[Batch], repeats: int, baseline: str) -> dict[str, Timing]:
    with Progress() as bars:
        bar = bars.add_task("time, one sample after the other", total=len(samples) * repeats)
        return compare(variants, samples, repeats, baseline=baseline, on_done=lambda *_: bars.advance(bar))


def _key(entry: Entry) -> tuple[str, int]:
    return ExitPolicy(entry.policy.rules, entry.policy.kv_fill, entry.policy.backlog).to_json(), id(entry.forced)


def _samples(batches: list[Batch], count: int) -> list[Batch]:
    """Return single samples, spread evenly over the data, each with its place (batch, row)."""
    places = [(b, r) for b, batch in enumerate(batches) for r in range(len(batch["sample_id"]))]
    chosen = [places[i] for i in np.unique(np.linspace(0, len(places) - 1, count).astype(int))]
    return [single(batches[b], r) | {"place": (b, r)} for b, r in chosen]


def _variant(engine: ExitEngine, forced: list[Any] | None, prefix: Any) -> Variant:
    if forced is None:
        return engine_variant(engine, None, prefix)

    @torch.inference_mode()
    def replay(inputs: dict[str, Any]) -> torch.Tensor:
        b, r = inputs["place"]
        return engine.run(None, prefix, False, inputs, forced=[forced[b][r]])[0].sequences

    return replay


def _parts(engine: ExitEngine, forced: list[Any] | None, samples: list, prefix: Any) -> dict[str, float]:
    streams = {stream.name for stream in engine.backbone.encoders}
    total: dict[str, float] = {}
    for sample in samples:
        b, r = sample["place"]
        depths = None if forced is None else [forced[b][r]]
        with torch.inference_mode():
            ms = engine.run(None, prefix, True, sample, forced=depths)[0].timings
        for part, value in ms.items():
            name = "encoder" if part in streams else part if part in ("total", "signals") else "decoder"
            total[name] = total.get(name, 0.0) + value / len(samples)
            if name == "signals":
                total["decoder"] = total.get("decoder", 0.0) + value / len(samples)
    return total
