"""What every line of a benchmark answers, and how answers are scored."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from torch import nn

from lightning_mue.backbones import view
from lightning_mue.callbacks.batches import Batch, on_device, together
from lightning_mue.inference.rows import PrefixFn
from lightning_mue.metrics import DocumentFrequencies, scorer
from lightning_mue.metrics.answers import Score

PLACE = "place"
"""Key of a batch: where in the test data its samples are."""


@dataclass(frozen=True)
class Exam:
    """Test data, and the score of an answer.

    Args:
        model: the backbone with its exits.
        data: the datamodule, for its processor and the constraint to closed answers.
        batches: of test data, on the model's device.
        score: prediction, references -> number.
        max_new_tokens: at most; None: as the generation config says.
    """

    model: nn.Module
    data: Any
    batches: list[Batch]
    score: Score
    max_new_tokens: int | None = None

    @classmethod
    def of(cls, model: nn.Module, data: Any, metric: str, max_new_tokens: int | None = None) -> Exam:
        """Read the test data of a datamodule; CIDEr-D goes by the document frequencies of all its references."""
        batches = [on_device(batch, model) for batch in data.test_dataloader()]
        frequencies = None
        if metric == "cider":
            references = [refs for batch in batches for refs in batch["references"]]
            frequencies = DocumentFrequencies.from_references(references)
        return cls(model, data, batches, scorer(metric, frequencies), max_new_tokens)

    @cached_property
    def prefix(self) -> PrefixFn | None:
        """The constraint to closed answers, if there is one."""
        constraint: PrefixFn | None = self.data.answer_constraint(view(self.model).decode_settings(None).end_ids[0])
        return constraint

    def __len__(self) -> int:
        return count(self.batches)

    def picked(self, samples: int, size: int = 1) -> list[Batch]:
        """Return batches of ``size``, of so many samples together, evenly spread over the data.

        None has more padding than its own rows ask for, and each knows their ``PLACE`` in the data.

        Raises:
            ValueError: no batch of the test data has so many rows.
        """
        starts = np.cumsum([0, *(len(batch["sample_id"]) for batch in self.batches)])
        ranges = [range(0, int(end - start) - size + 1, size) for start, end in pairwise(starts)]
        places = [(k, first) for k, firsts in enumerate(ranges) for first in firsts]
        if not places:
            most = int(np.diff(starts).max(initial=0))
            raise ValueError(
                f"No batch of {size} can be made of the test data, whose largest batch has {most} rows; ask for a "
                "smaller one, or raise the data's `eval_batch_size`"
            )
        chosen = np.unique(np.linspace(0, len(places) - 1, max(1, samples // size)).astype(int))
        found = []
        for k, first in (places[i] for i in chosen):
            rows = range(first, first + size)
            found.append(together(self.batches[k], rows) | {PLACE: [int(starts[k]) + row for row in rows]})
        return found


def count(batches: Iterable[Batch]) -> int:
    """Return how many samples there are."""
    return sum(len(batch["sample_id"]) for batch in batches)
