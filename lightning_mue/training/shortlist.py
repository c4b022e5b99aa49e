"""Which tokens the training labels are made of: the shortlist that the decoder's gates look at."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_mue.exits import Exits
from lightning_mue.training.supervised import IGNORE

COUNTED_BATCHES = 100
"""Batches whose labels are counted where the references are not at hand."""

TEXTS = 1000
"""References tokenized at once."""


class FirstLabels:
    """Makes the shortlist of the labels of the first training batches.

    Args:
        exits: whose shortlist.
        vocab_size: of the backbone's head.
    """

    def __init__(self, exits: Exits, vocab_size: int) -> None:
        self._exits, self._batches = exits, 0
        self._counts_V = torch.zeros(vocab_size, dtype=torch.long, device=next(exits.parameters()).device)

    def see(self, labels_BT: Tensor) -> None:
        """Count one batch's labels ``[B, T]`` (-100 where none counts), on all ranks together."""
        if self._batches == COUNTED_BATCHES:
            return
        counts_V = label_counts(labels_BT, len(self._counts_V))
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts_V)
        self._batches += 1
        self._counts_V += counts_V
        self._exits.set_shortlist(self._counts_V)


def begin_shortlist(exits: Exits, vocab_size: int, datamodule: Any, step: int) -> FirstLabels | None:
    """Make the shortlist before training begins; if the references are not at hand, return what the batches must tell.

    Args:
        exits: without a shortlist nothing is done.
        vocab_size: of the backbone's head.
        datamodule: has ``train_samples`` and a ``processor``, as ShardsDataModule does, or is anything else.
        step: of the run; a run that goes on keeps the shortlist of its checkpoint.
    """
    if exits.shortlist is None or step > 0:
        return None
    store, processor = (getattr(datamodule, name, None) for name in ("train_samples", "processor"))
    if store is None or processor is None:
        return FirstLabels(exits, vocab_size)
    texts = [text for sample in store.samples for text in sample.references]
    counts_V = torch.zeros(vocab_size, dtype=torch.long)
    for k in range(0, len(texts), TEXTS):
        counts_V += label_counts(processor.labels(texts[k : k + TEXTS]), vocab_size)
    exits.set_shortlist(counts_V)
    return None


def label_counts(labels_BT: Tensor, vocab_size: int) -> Tensor:
    """Return how often each token occurs in labels, end tokens included: int64 ``[V]``."""
    return torch.bincount(labels_BT[labels_BT != IGNORE], minlength=vocab_size)
