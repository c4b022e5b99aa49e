"""The ways to answer that a benchmark compares, and the time that each of them takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import Tensor

from lightning_mue.answers import Answers, answer, plain_answers
from lightning_mue.benchmark.exam import Exam
from lightning_mue.callbacks.batches import Batch
from lightning_mue.inference import ExitEngine, ExitOutput
from lightning_mue.inference.compare import Timing, Variant, compare
from lightning_mue.inference.rows import groups_of
from lightning_mue.policy import ExitPolicy

Done = Callable[[int], object]
"""Told how many samples were answered."""


@dataclass(frozen=True)
class Placed(ExitPolicy):
    """A policy that says what runs its layers, whatever it was calibrated for."""

    where: str = "torch"

    @property
    def runtime(self) -> str:
        """What runs the layers."""
        return self.where


@dataclass(frozen=True)
class Line:
    """One way to answer.

    Args:
        answer: a batch -> token ids ``[B, 1 + T]``.
        decode: told of progress -> the answers to all test data.
        timed: a batch -> what the engine gave, with the time of each part; None for another engine.
        full: name of the line that does the same at full depth; None for another engine.
        policy: of the engine.
        note: a few words.
    """

    answer: Variant
    decode: Callable[[Done], Answers]
    timed: Callable[[Batch], ExitOutput] | None = None
    full: str | None = None
    policy: ExitPolicy | None = None
    note: str = ""


def plain_line(exam: Exam, variant: Variant, note: str = "") -> Line:
    """Return the line of another engine."""

    def decode(done: Done) -> Answers:
        scores, texts = plain_answers(variant, exam.batches, exam.data, exam.score, done)
        clusters = [cluster for batch in exam.batches for cluster in batch["cluster"]]
        return Answers(scores, clusters, texts, {}, [], computed=np.nan, filled=np.nan, layers_saved=np.nan)

    return Line(variant, decode, note=note)


def engine_line(exam: Exam, policy: ExitPolicy, full: str | None = None, note: str = "") -> Line:
    """Return the line of our engine under a policy."""
    engine = ExitEngine(exam.model, policy, check_fingerprint=False)

    def run(timings: bool, batch: Batch) -> ExitOutput:
        return engine.generate(exam.max_new_tokens, exam.prefix, timings, groups_of(policy, batch), **batch)

    def decode(done: Done) -> Answers:
        return answer(exam.model, policy, exam.batches, exam.data, exam.score, done=done)

    return Line(lambda batch: run(False, batch).sequences, decode, partial(run, True), full, policy, note)


@dataclass(frozen=True)
class Times:
    """A line's times, measured in turn with others'.

    Args:
        timing: summed up; its ratio is to the baseline of the measurement.
        ms: of every sample (or batch) in every repeat, ``[repeats, samples]``.
    """

    timing: Timing
    ms: np.ndarray

    def over(self, other: Times) -> tuple[float, float | None]:
        """Return the ratio to another line's, paired by sample and repeat, and its interquartile range over repeats."""
        ratios = np.median(self.ms / other.ms, axis=1)
        low, high = np.percentile(ratios, [25, 75])
        return float(np.median(ratios)), float(high - low) if len(ratios) > 1 else None


def measure(
    variants: Mapping[str, Variant],
    samples: Sequence[Batch],
    repeats: int,
    baseline: str,
    done: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Times]:
    """Time all variants in turn, as `compare` does, keeping every time it took.

    Args:
        variants: name -> what answers.
        samples: what they answer, one after the other; the first one is answered untimed before.
        repeats: of all samples.
        baseline: what the timings' ratios refer to.
        done: called after every sample.
        clock: seconds.
    """
    order: list[str] = []
    instants: list[float] = []

    def noted(name: str, variant: Variant) -> Variant:
        def run(sample: Batch) -> Tensor:
            order.append(name)
            return variant(sample)

        return run

    def noting_clock() -> float:
        instants.append(clock())
        return instants[-1]

    def told(_turn: int, _turns: int) -> None:
        done()

    for variant in variants.values():
        variant(samples[0])
    noting = {name: noted(name, variant) for name, variant in variants.items()}
    timings = compare(noting, samples, repeats, 0, told, baseline, noting_clock)
    begin, end = np.array(instants).reshape(-1, 2).T
    shape = (repeats, len(samples))
    ms = {name: ((end - begin)[np.array(order) == name] * 1e3).reshape(shape) for name in variants}
    return {name: Times(timings[name], ms[name]) for name in variants}
