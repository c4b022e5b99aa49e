"""Samples at hand: all texts in memory, pictures decoded in memory up to a limit, the others left in their shards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from lightning_mue.data.images import decode, verify
from lightning_mue.data.shards import BadSamples, Picture, read_shards
from lightning_mue.data.tasks import Sample, cluster_point, make_samples


@dataclass
class SampleStore:
    """Samples that can be reached in any order.

    Args:
        samples: ``image`` is None where the picture stays in its shard.
        pictures: for each sample, where its picture lies.
        bad: what to do with a picture that turns out to be broken, and what was skipped.
    """

    samples: list[Sample]
    pictures: list[Picture]
    bad: BadSamples

    def __len__(self) -> int:
        return len(self.samples)

    def load(self, index: int) -> Sample | None:
        """Return a sample with its picture; None when the picture is broken and broken ones are skipped.

        Raises:
            ValueError: the picture is broken and broken ones are refused.
        """
        sample = self.samples[index]
        if sample.image is not None:
            return sample
        try:
            return replace(sample, image=self.pictures[index].load())
        except ValueError as error:
            self.bad.meet(error)
            return None

    def where(self, keep: Callable[[Sample], bool]) -> SampleStore:
        """Return the samples that ``keep`` says yes to, in the same order."""
        kept = [k for k, sample in enumerate(self.samples) if keep(sample)]
        return SampleStore([self.samples[k] for k in kept], [self.pictures[k] for k in kept], self.bad)


def limited(store: SampleStore, limit: int, salt: str) -> SampleStore:
    """Return whole clusters in order of hash while they fit, so that more room only ever adds to them.

    Args:
        store: the samples.
        limit: most samples.
        salt: makes that order another one.

    Raises:
        ValueError: not one cluster fits.
    """
    sizes: dict[str, int] = {}
    for sample in store.samples:
        sizes[sample.cluster] = sizes.get(sample.cluster, 0) + 1
    kept, total = set[str](), 0
    for cluster in sorted(sizes, key=partial(cluster_point, salt=salt)):
        if total + sizes[cluster] > limit:
            break
        kept.add(cluster)
        total += sizes[cluster]
    if not kept:
        raise ValueError(f"`calibration_limit` = {limit} is less than the samples of one picture: raise it")

    def inside(sample: Sample) -> bool:
        return sample.cluster in kept

    return store.where(inside)


def read_samples(
    shards: Sequence[Path],
    task: str,
    bad: BadSamples,
    memory_limit_mb: float = 1000.0,
    questions_per_picture: int | None = None,
    salt: str = "",
    also: Sequence[str] = (),
) -> SampleStore:
    """Reads all samples of a task, and of others beside it.

    Args:
        shards: the tars, in order.
        task: see ``make_samples``; it says what a picture's cluster is.
        bad: what to do with broken shards and samples.
        memory_limit_mb: pictures stay decoded in memory (3 bytes a pixel, in 10^6 bytes) until they fill this.
        questions_per_picture: most samples of a picture and task, chosen by hash; None keeps all.
        salt: makes that choice another one.
        also: the other tasks.

    Raises:
        ValueError: something is broken and ``bad`` refuses it, two samples have one id, or there is no sample.
    """
    store, room, seen, before = SampleStore([], [], bad), memory_limit_mb * 1e6, set[str](), len(bad.messages)
    for place, data, record in read_shards(shards, bad):
        try:
            image = decode(data, place.shard, place.key) if room > 0 else None
            if image is None:
                verify(data, place.shard, place.key)
            by_task = [_named_samples(record, image, name, place, seen) for name in (task, *also)]
        except ValueError as error:
            bad.meet(error)
            continue
        room -= 3 * image.width * image.height if image else 0
        cluster = by_task[0][0].cluster
        for samples in by_task:
            seen.add(samples[0].sample_id)
            store.samples += [replace(s, cluster=cluster) for s in _few(samples, questions_per_picture, salt)]
        store.pictures += [place] * (len(store.samples) - len(store.pictures))
    bad.warn(before)
    if not store.samples:
        names = ", ".join(str(shard) for shard in shards)
        raise ValueError(f"{names}: there is no sample for task {task!r} ({len(bad.messages) - before} skipped)")
    return store


def _named_samples(
    record: dict[str, Any], image: Image.Image | None, task: str, place: Picture, seen: set[str]
) -> list[Sample]:
    try:
        samples = make_samples(record, image, task)
        if samples[0].sample_id in seen:
            raise ValueError(f"the id {record['id']!r} is used twice")
    except ValueError as error:
        raise ValueError(f"sample {place.key!r} of {place.shard}: {error}") from error
    return samples


def _few(samples: list[Sample], most: int | None, salt: str) -> list[Sample]:
    if most is None or len(samples) <= most:
        return samples
    chosen = sorted(samples, key=lambda sample: cluster_point(sample.sample_id, salt))[:most]
    return [sample for sample in samples if sample in chosen]
