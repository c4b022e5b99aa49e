"""Batches in an order that only (seed, epoch) decides, equally many on every rank, resumable in mid-epoch."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch import Tensor, distributed
from torch.utils.data import DataLoader, Dataset

from lightning_mue.data.augment import Augmentation, augment, other_digits
from lightning_mue.data.store import SampleStore
from lightning_mue.data.tasks import Sample
from lightning_mue.prompt import Word

Batch = dict[str, Any]
Plan = Callable[[int], list[list[int]]]


class Processor(Protocol):
    """What turns pictures and texts into tensors, and tokens back into texts."""

    def __call__(
        self, images: Sequence[Image.Image], text: Sequence[str], words: Sequence[Sequence[Word]] | None = None
    ) -> dict[str, Tensor]:
        """Return ``pixel_values [B, 3, H, W]``, ``input_ids [B, S]``, ``attention_mask [B, S]``; ``bbox`` of words."""

    def labels(self, text: Sequence[str]) -> Tensor:
        """Return token ids ``[B, T]``, each row ended by ``</s>`` and padded with -100; no start token."""

    def decoder_prompts(self, text: Sequence[str]) -> Tensor:
        """Return token ids ``[B, P]`` without start and end tokens, padded with -100 on the right."""

    def decode(self, sequences: Tensor) -> list[str]:
        """Return the texts of token ids ``[B, T]``."""


POOL = 20
"""Batches among which samples of like length are brought together."""


def train_batches(
    count: int,
    batch_size: int,
    seed: int,
    epoch: int,
    rank: int = 0,
    world: int = 1,
    lengths: Sequence[int] | None = None,
) -> list[list[int]]:
    """Shuffles one epoch: every sample at least once over all ranks.

    Ranks share samples, not shards: each has the same number of batches of the same sizes, for which at most
    ``world - 1`` samples come twice.

    Args:
        count: number of samples.
        batch_size: samples a batch and rank.
        seed: with ``epoch``, decides the order.
        epoch: counted from 0.
        rank: whose batches.
        world: number of ranks.
        lengths: of the samples; then batches hold samples of like length, so that little of them is padding.

    Returns:
        Indices of the samples, batch by batch.
    """
    random_order = np.random.default_rng([seed, epoch])
    order = random_order.permutation(count)
    mine = np.resize(order, -(-count // world) * world)[rank::world].tolist()
    if lengths is None:
        return _cut(mine, batch_size)
    pools = [sorted(pool, key=lengths.__getitem__) for pool in _cut(mine, POOL * batch_size)]
    batches = [batch for pool in pools for batch in _cut(pool, batch_size)]
    return [batches[k] for k in random_order.permutation(len(batches))]


def eval_batches(sample_ids: Sequence[str], batch_size: int, rank: int = 0, world: int = 1) -> list[list[int]]:
    """Orders samples by id; batch ``k`` goes to rank ``k mod world``, so its composition knows no world size.

    Ranks that would have fewer batches repeat some (drop repeats by sample id).

    Args:
        sample_ids: ids of the samples.
        batch_size: samples a batch.
        rank: whose batches.
        world: number of ranks.

    Returns:
        Indices of the samples, batch by batch.
    """
    order = sorted(range(len(sample_ids)), key=sample_ids.__getitem__)
    batches = [order[k : k + batch_size] for k in range(0, len(order), batch_size)]
    return [batches[k % len(batches)] for k in range(rank, -(-len(batches) // world) * world, world)]


def _cut(items: list[int], size: int) -> list[list[int]]:
    return [items[k : k + size] for k in range(0, len(items), size)]


class EncodedBatches(Dataset[Batch]):
    """Makes the batch that a list of indices names.

    Args:
        store: the samples.
        processor: the encoder of pictures and texts.
        seed: draws the reference that is the label, with epoch and index; None takes the first reference.
        augmentations: of the pictures and of the words that stand on them, drawn likewise.
    """

    def __init__(
        self,
        store: SampleStore,
        processor: Processor,
        seed: int | None = None,
        augmentations: Sequence[Augmentation] = (),
    ) -> None:
        self.store, self.processor, self.seed, self.augmentations = store, processor, seed, augmentations

    def __getitem__(self, item: tuple[int, list[int]]) -> Batch:
        """Return the batch of ``(epoch, indices)``; samples with a broken picture are left out where that is asked.

        Raises:
            ValueError: a picture is broken and refused, or all of the batch are.
        """
        epoch, indices = item
        samples, labels = [], []
        for index in indices:
            sample = self.store.load(index)
            if sample is not None:
                sample, label = self._augmented(sample, self.label(epoch, index), epoch, index)
                samples.append(sample)
                labels.append(label)
        if not samples:
            last = "; ".join(self.store.bad.messages[-len(indices) :])
            raise ValueError(f"every picture of a batch is broken, restore the shards: {last}")
        images = [sample.image for sample in samples if sample.image is not None]
        pages = [sample.words for sample in samples]
        given: dict[str, Any] = {"words": pages} if any(pages) else {}
        batch: Batch = dict(self.processor(images=images, text=[sample.prompt for sample in samples], **given))
        batch["labels"] = self.processor.labels(labels)
        if any(sample.decoder_prompt for sample in samples):
            batch["decoder_prompt"] = self.processor.decoder_prompts([sample.decoder_prompt for sample in samples])
        for name in ("sample_id", "cluster", "references", "level"):
            batch[name] = [getattr(sample, name) for sample in samples]
        for name in set.intersection(*(set(sample.kinds) for sample in samples)) - batch.keys():
            batch[name] = [sample.kinds[name] for sample in samples]
        batch["prompt"] = [f"{sample.prompt} {sample.decoder_prompt}".rstrip() for sample in samples]
        return batch

    def label(self, epoch: int, index: int) -> str:
        """Return the reference that is a sample's label in an epoch."""
        references = self.store.samples[index].references
        if self.seed is None or len(references) == 1:
            return references[0]
        return random.Random(f"{self.seed}/{epoch}/{index}").choice(references)

    def length(self, epoch: int, index: int) -> int:
        """Return how much text others are padded to in an epoch beside a sample: the words of its page, its label."""
        return sum(len(text) for text, _ in self.store.samples[index].words) + len(self.label(epoch, index))

    def _augmented(self, sample: Sample, label: str, epoch: int, index: int) -> tuple[Sample, str]:
        if self.augmentations and sample.image is not None:
            rng = random.Random(f"{self.seed}/{epoch}/{index}/picture")
            sample = replace(sample, image=augment(sample.image, self.augmentations, rng))
        if "digits" in self.augmentations:
            table = other_digits(random.Random(f"{self.seed}/{epoch}/{index}/digits"))
            words = tuple((text.translate(table), box) for text, box in sample.words)
            sample, label = replace(sample, words=words), label.translate(table)
        return sample, label


_FORKS_MAY_HANG = sys.version_info < (3, 12)
"""Gloo's threads take a lock of Python's without holding the GIL, and a process that is forked meanwhile waits for it
forever (CPython's issue 112275; not in 3.12, nor in the last versions of 3.11)."""


class BatchLoader:
    """Iterates over a plan of batches; Lightning saves and restores where it stands.

    Args:
        dataset: makes batches of indices.
        plan: epoch -> this rank's batches; equally many in every epoch and on every rank.
        num_workers: processes that make batches; 0 makes them here, and so does, before Python 3.12, a run on several
            processes that talk by gloo.
        name: what the plan depends on, as one text; a state of another plan is refused in mid-epoch.
    """

    def __init__(self, dataset: EncodedBatches, plan: Plan, num_workers: int = 0, name: str = "") -> None:
        self.dataset, self.plan, self.num_workers, self.name = dataset, plan, num_workers, name
        self.epoch = 0
        self._length = len(plan(0))
        self._at = (0, 0)  # epoch and number of its batches handed out
        self._resumed = False
        # Lightning calls `loader.batch_sampler.sampler.set_epoch` before each epoch, as on a DistributedSampler.
        self.batch_sampler = _EpochSetter(self)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        # A generator: nothing runs before the first batch is asked for, when Lightning, which makes the iterator
        # earlier, has said which epoch it is.
        epoch = self.epoch
        first = self._at[1] if self._resumed and self._at[0] == epoch else 0
        self._resumed = False
        items = [(epoch, indices) for indices in self.plan(epoch)][first:]
        for k, batch in enumerate(self._made(items), start=first + 1):
            self._at = (epoch, k)
            yield batch

    def _made(self, items: list[tuple[int, list[int]]]) -> Iterator[Batch]:
        if self.num_workers == 0 or (_FORKS_MAY_HANG and _talks_by_gloo()):
            return (self.dataset[item] for item in items)
        # batch_size=None: an item names a whole batch already.
        return iter(
            DataLoader(
                self.dataset,
                batch_size=None,
                sampler=items,  # type: ignore[arg-type]
                num_workers=self.num_workers,
                collate_fn=_as_it_is,
            )
        )

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch comes next."""
        self.epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, the number of its batches handed out, and the plan's name."""
        return {"epoch": self._at[0], "batch": self._at[1], "plan": self.name}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues after the last batch that was handed out, when its epoch is asked for next.

        Raises:
            ValueError: the state stands in the middle of an epoch of another plan.
        """
        if state["plan"] != self.name and 0 < state["batch"] < self._length:
            raise ValueError(
                f"the checkpoint was written in mid-epoch with {state['plan']}, this run has {self.name}: resume with "
                "the same data, seed, batch size and number of devices, or from a checkpoint of an epoch's end"
            )
        self._at = (state["epoch"], state["batch"])
        self._resumed = True


class _EpochSetter:
    def __init__(self, loader: BatchLoader) -> None:
        self.sampler = loader


def _talks_by_gloo() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_backend() == "gloo"


def _as_it_is(batch: Any) -> Any:
    return batch
