"""A task's calibration data as a pool: decoded under each policy once, and kept in a folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
from papers.task import Task

from lightning_mue.backbones import fingerprint
from lightning_mue.calibration import Decoded
from lightning_mue.callbacks.batches import Batch, content, rows_of, single
from lightning_mue.callbacks.journal import Journal
from lightning_mue.inference import ExitEngine
from lightning_mue.inference.compare import compare, engine_variant
from lightning_mue.latency import LatencyTable
from lightning_mue.policy import ExitPolicy
from lightning_mue.trace import Trace


class Pool:
    """Everything that calibrations of one task draw from.

    Args:
        task: a trained recipe; the pool is its calibration data.
        folder: keeps what was decoded, so that a run goes on where it was.
    """

    def __init__(self, task: Task, folder: str | Path) -> None:
        self._task = task
        data = [content(batch) for batch in task.tuning]
        self._journal = Journal(folder, {"weights": fingerprint(task.model), "data": data, "metric": task.metric})
        self.sample_ids = [name for batch in task.tuning for name in batch["sample_id"]]
        self.clusters = [cluster for batch in task.tuning for cluster in batch["cluster"]]
        self.proposes = np.array([self._proposes(cluster) for cluster in self.clusters])
        """bool ``[n]``: whether a sample is in the part that proposes, as in any calibration; the rest certifies."""

    def __call__(self, policy: ExitPolicy) -> Decoded:
        """Return what ``policy`` makes of the whole pool."""
        found = self._journal.piece("decoded", [policy.to_json()], lambda: self._decode(policy))
        scores = {self._task.metric: np.array(found["scores"])}
        return Decoded(self.sample_ids, self.clusters, scores, np.array(found["same"], dtype=bool))

    def part(self, rows: np.ndarray) -> Callable[[ExitPolicy], Decoded]:
        """Return what decodes the samples marked in ``rows`` alone."""
        return lambda policy: taken(self(policy), np.flatnonzero(rows))

    @cached_property
    def trace(self) -> Trace:
        """The full-depth pass over the part that proposes."""
        parts = [rows_of(batch, [self._proposes(c) for c in batch["cluster"]]) for batch in self._task.tuning]
        task = replace(self._task, tuning=[batch for batch in parts if batch["sample_id"]])
        return Trace.load(self._journal.trace("trace", [], lambda: task.trace))

    @cached_property
    def latency(self) -> LatencyTable:
        """What each piece costs on this device."""
        path = self._journal.path("latency", [], ".json")
        if not path.exists():
            self._task.latency.save(path)
        return LatencyTable.load(path)

    def measured_ms(self, policies: dict[str, ExitPolicy], sample_ids: list[str], repeats: int) -> dict[str, float]:
        """Return name -> mean milliseconds a sample at batch 1, all policies in turn on these samples."""
        texts = {name: policy.to_json() for name, policy in policies.items()}

        def time() -> dict[str, float]:
            engines = {n: ExitEngine(self._task.model, p, check_fingerprint=False) for n, p in policies.items()}
            variants = {name: engine_variant(engine, None, self._task.prefix) for name, engine in engines.items()}
            timings = compare(variants, self._singles(sample_ids), repeats)
            return {name: timing.mean_ms for name, timing in timings.items()}

        return self._journal.piece("times", [texts, sample_ids, repeats], time)

    def _decode(self, policy: ExitPolicy) -> dict[str, list]:
        found = self._task.rehearsed(policy)
        return {"scores": found.scores[self._task.metric].tolist(), "same": found.same.tolist()}

    def _proposes(self, cluster: str) -> bool:
        return self._task.data.split_of(cluster) == "propose"

    def _singles(self, sample_ids: list[str]) -> list[Batch]:
        wanted = set(sample_ids)
        return [
            single(batch, row)
            for batch in self._task.tuning
            for row, name in enumerate(batch["sample_id"])
            if name in wanted
        ]


def taken(found: Decoded, rows: np.ndarray) -> Decoded:
    """Return the decoding of the samples at these indices."""
    ids, clusters = ([names[i] for i in rows] for names in (found.sample_ids, found.clusters))
    scores = {metric: values[rows] for metric, values in found.scores.items()}
    return Decoded(ids, clusters, scores, found.same[rows])
