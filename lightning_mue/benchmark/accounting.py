"""What answers take by count: multiply-adds, and the least time on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_mue.answers import Answers
from lightning_mue.backbones import view
from lightning_mue.benchmark.exam import PLACE, Exam
from lightning_mue.benchmark.limits import HEAD, Runs, answer_runs, least_seconds, macs
from lightning_mue.benchmark.machine import measure_machine
from lightning_mue.benchmark.work import ModelWork, model_work
from lightning_mue.callbacks.batches import Batch


class Accounting:
    """Counts answers whose depths are known; K/V are taken to be caught up just in time.

    Args:
        exam: what is answered.
        precision: of the limits; None is the model's own.
    """

    def __init__(self, exam: Exam, precision: str | None) -> None:
        one = next(exam.model.parameters())
        weights = sum(parameter.numel() for parameter in exam.model.parameters())
        self._exam, self._names = exam, view(exam.model).generate_inputs
        self.machine = measure_machine(precision_name(exam.model, precision), weights, one.device)
        self.head = measure_machine(HEAD, weights, one.device)
        self._work: dict[Any, ModelWork] = {}

    def macs(self, samples: Sequence[Batch], answers: Answers) -> float:
        """Return the mean multiply-adds of one answer."""
        return sum(macs(self._runs(batch, answers)) for batch in samples) / sum(len(batch[PLACE]) for batch in samples)

    def least_ms(self, samples: Sequence[Batch], answers: Answers) -> list[dict[str, float]]:
        """Return part -> the least milliseconds, of each batch."""
        seconds = (least_seconds(self._runs(batch, answers), self.machine, self.head) for batch in samples)
        return [{part: of_part * 1e3 for part, of_part in of_batch.items()} for of_batch in seconds]

    def _runs(self, batch: Batch, answers: Answers) -> Runs:
        places, rows = batch[PLACE], [row for of_batch in answers.by_row for row in of_batch]
        streams = {name: depth_N[places].tolist() for name, depth_N in answers.depths.items() if name != "decoder"}
        prompt = batch.get("decoder_prompt")
        prompts = (prompt >= 0).sum(1).tolist() if isinstance(prompt, Tensor) else None
        work = self._of(batch)
        return answer_runs(work.streams, work.decoder, streams, [rows[i] for i in places], prompts)

    def _of(self, batch: Batch) -> ModelWork:
        """Return what the pieces take on inputs of this size, counted once."""
        inputs = {name: batch[name] for name in self._names if isinstance(batch.get(name), Tensor)}
        key = tuple(tensor.shape for tensor in inputs.values())
        if key not in self._work:
            self._work[key] = model_work(self._exam.model, inputs)
        return self._work[key]


def precision_name(model: torch.nn.Module, precision: str | None) -> str:
    """Return what a model computes in under a policy of this precision."""
    return precision or str(next(model.parameters()).dtype).removeprefix("torch.")
