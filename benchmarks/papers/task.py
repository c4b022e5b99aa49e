"""A trained recipe with the data to tune methods on and the data to measure them on."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from runs import load_run
from torch import nn

from lightning_mue.answers import Answers, answer
from lightning_mue.backbones import num_layers, view
from lightning_mue.calibration import Decoded
from lightning_mue.callbacks.batches import Batch, single
from lightning_mue.inference.profile import measure_latency
from lightning_mue.inference.record import record
from lightning_mue.latency import LatencyTable
from lightning_mue.metrics import DocumentFrequencies, scorer
from lightning_mue.metrics.answers import Score
from lightning_mue.policy import ExitPolicy
from lightning_mue.trace import Trace


@dataclass
class Task:
    """What the tables are made of.

    Args:
        name: of the task, in file names and titles.
        metric: scores answers.
        keep: what every method has to keep on the tuning data: the share of full-depth quality, or of its very outputs.
        tune_by: ``quality`` or ``outputs``; where quality is a matter of taste, few samples cannot see a drop in it.
        model: the backbone with its exits.
        data: the datamodule.
        layers: stream name -> exit layers.
        tuning: batches of the recipe's calibration data.
        test: batches of its test data.
    """

    name: str
    metric: str
    keep: float
    tune_by: str
    model: nn.Module
    data: Any
    layers: dict[str, list[int]]
    tuning: list[Batch]
    test: list[Batch]

    @classmethod
    def load(cls, args: argparse.Namespace) -> Task:
        """Read what the command line (``arguments``) asks for."""
        if Path(args.ckpt_path).name.startswith("best"):
            raise SystemExit("Give last.ckpt: best.ckpt was chosen on data that may be the test data here.")
        torch.set_num_threads(args.threads)
        changed: dict[str, Any] = {} if args.data is None else {"train": args.data}
        changed["calibration_limit"] = args.tuning_samples  # whole sources, chosen by hash
        module, data = load_run(args.ckpt_path, **changed)
        data.setup("test")
        layers = {stream: list(ks) for stream, ks in module.exits.layers.items()}
        tuning, test = list(data.val_dataloader()), list(data.test_dataloader())[: args.test_batches]
        if shared := _clusters(tuning) & _clusters(test):
            raise SystemExit(
                f"{len(shared)} sources are in both tuning and test data, such as {min(shared)}; give test shards, or "
                "a `holdout` of the training data to tune on."
            )
        return cls(args.name, args.metric, args.keep, args.tune_by, module.model, data, layers, tuning, test)

    @cached_property
    def score(self) -> Score:
        """Scores one answer; CIDEr-D by the document frequencies of all references here."""
        references = [refs for batch in (*self.test, *self.tuning) for refs in batch["references"]]
        return scorer(self.metric, DocumentFrequencies.from_references(references) if self.metric == "cider" else None)

    @cached_property
    def last(self) -> dict[str, int]:
        """Stream name -> layers at full depth."""
        return num_layers(view(self.model))

    @cached_property
    def prefix(self) -> Any:
        """The constraint to closed answers, if there is one."""
        return self.data.answer_constraint(view(self.model).decode_settings(None).end_ids[0])

    @cached_property
    def trace(self) -> Trace:
        """Every signal on the tuning data, at full depth."""
        return Trace.merge([self._record(batch) for batch in track(self.tuning, "recording the tuning data")])

    @cached_property
    def latency(self) -> LatencyTable:
        """What each piece costs here."""
        return measure_latency(self.model, single(self.tuning[0], 0))

    def decode(self, policy: ExitPolicy, forced: list[Any] | None = None) -> Answers:
        """Answer the test data."""
        return answer(self.model, policy, self.test, self.data, self.score, forced)

    def tuning_quality(self, policy: ExitPolicy) -> float:
        """Return what has to be kept on the tuning data, decoded for real."""
        found = answer(self.model, policy, self.tuning, self.data, self.score)
        return found.quality if self.tune_by == "quality" else found.same(self._full)

    def rehearsed(self, policy: ExitPolicy) -> Decoded:
        """Decode the tuning data, as the calibrator does to make its chain."""
        found = answer(self.model, policy, self.tuning, self.data, self.score)
        ids = [name for batch in self.tuning for name in batch["sample_id"]]
        same = np.array([a == b for a, b in zip(found.texts, self._full.texts, strict=True)])
        return Decoded(ids, found.clusters, {self.metric: found.scores}, same)

    @cached_property
    def _full(self) -> Answers:
        return answer(self.model, ExitPolicy.full_depth(), self.tuning, self.data, self.score)

    @cached_property
    def least(self) -> float:
        """The least that every method has to keep on the tuning data."""
        return self.keep * (self._full.quality if self.tune_by == "quality" else 1.0)

    def _record(self, batch: Batch) -> Trace:
        return record(
            self.model, batch, batch["sample_id"], batch["cluster"], partial(self._scores, batch), None, self.prefix
        )

    def _scores(self, batch: Batch, sequences: torch.Tensor) -> dict[str, list[float]]:
        texts = self.data.processor.decode(sequences[:, 1:])
        return {self.metric: [self.score(text, refs) for text, refs in zip(texts, batch["references"], strict=True)]}


def command(args: argparse.Namespace, module: str) -> str:
    """Return the command line that measures this again, without the names of folders here."""
    hidden = {"ckpt_path": "CKPT", "data": "SHARDS", "policy": "POLICY"}
    given = {name: hidden.get(name, value) for name, value in vars(args).items() if value is not None}
    words = (f"--{n if n == 'ckpt_path' else n.replace('_', '-')} {v}" for n, v in given.items())
    return " ".join([f"python -m {module}", *words])


def _clusters(batches: list[Batch]) -> set[str]:
    return {cluster for batch in batches for cluster in batch["cluster"]}


def arguments(description: str) -> argparse.ArgumentParser:
    """Return the command line that all tables share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt_path", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--data", help="the shards, if they lie elsewhere than in training")
    parser.add_argument("--metric", default="exact_match")
    parser.add_argument("--keep", type=float, default=0.98)
    parser.add_argument("--tune-by", choices=["quality", "outputs"], default="quality")
    parser.add_argument("--tuning-samples", type=int, default=None, help="at most; all calibration data if not given")
    parser.add_argument("--test-batches", type=int, default=None, help="at most; all test data if not given")
    parser.add_argument("--timed-samples", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    return parser
