"""What a calibration runs: a model that answers, or one that embeds. How it chooses and proves is the same for both."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Protocol

from lightning_mue.calibration.decoded import Decoded
from lightning_mue.callbacks.batches import Batch
from lightning_mue.callbacks.split_reader import SplitReader
from lightning_mue.latency import LatencyTable
from lightning_mue.policy import ExitPolicy


class Decoder(Protocol):
    """Runs policies on one split, with the engine that ships; on all ranks."""

    reader: SplitReader

    def __call__(self, policy: ExitPolicy, unchanged: Collection[str] = ()) -> Decoded:
        """Run the split under ``policy``, less samples known to come out unchanged; full depth comes first."""

    def signals(self) -> list[Path]:
        """Record the exits on the split; return the files of all ranks."""


class Subject(Protocol):
    """A model at work on a trainer's validation data."""

    runtime: str

    @property
    def settings(self) -> dict[str, Any]:
        """What a promise holds with, as plain values; known before any data is seen."""

    def measure(self, one: Batch, repeats: int, precision: str | None) -> LatencyTable:
        """Measure what each piece costs on one sample."""

    def decoder(self, split: str, groups: Sequence[str] | None) -> Decoder:
        """Return what runs policies on a split, or on its samples of these groups."""

    def is_simulated_exactly(self, policy: ExitPolicy) -> bool:
        """Whether recorded exits of the decoder tell which samples a policy leaves unchanged."""
