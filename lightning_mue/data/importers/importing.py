"""An import from beginning to end: check everything, write the shards that are missing, read all back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from lightning_mue.data.images import verify
from lightning_mue.data.importers.annotations import find_annotations, hash_of, read_annotations
from lightning_mue.data.importers.entry import Entry, refuse_twice
from lightning_mue.data.importers.jobs import ShardJob, run_jobs
from lightning_mue.data.importers.layout import SPLITS, Layout
from lightning_mue.data.importers.pictures import PictureSettings, locate
from lightning_mue.data.importers.state import begin, finish
from lightning_mue.data.shards import BadSamples, OnBad, read_shards
from lightning_mue.data.tasks import make_samples

NAMED = 20
"""Problems that a message names; of the others it says how many."""

Found = list[tuple[Entry, Path | None]]


@dataclass(frozen=True)
class Imported:
    """What an import gave.

    Args:
        shards: in order.
        images: pictures in them.
        texts: captions, questions or statements in them.
        samples: what our reader makes of them.
        left_out: pictures that are not in them, whether this run left them out or an earlier one.
        problems: one line for each picture and text that this run left out.
        note: what to know of how the annotations were read.
    """

    shards: list[Path]
    images: int
    texts: int
    samples: int
    left_out: int
    problems: list[str]
    note: str


def import_dataset(
    layout: Layout,
    annotations: str | Path | Sequence[str | Path],
    images: str | Path,
    out: str | Path,
    split: str = "train",
    settings: PictureSettings | None = None,
    shard_size: int = 1000,
    limit: int | None = None,
    workers: int = 1,
    on_bad: OnBad = "raise",
    overwrite: bool = False,
    progress: bool = True,
) -> Imported:
    """Makes a split of an official data set into shards.

    The shards depend on annotations, pictures and settings alone, never on ``workers`` or on interruptions: a finished
    shard is kept, and the same call goes on with the others. At the end all are read back.

    Args:
        layout: of the data set; see ``LAYOUTS``.
        annotations: a folder with the official files, or the files.
        images: folder of the pictures.
        out: folder for the shards; it may hold several splits of one data set.
        split: "train", "val" or "test".
        settings: how pictures are written; as they are when not given.
        shard_size: pictures a shard.
        limit: most pictures, the first ones; None takes all.
        workers: processes; each writes whole shards.
        on_bad: "raise" lists missing and unreadable pictures and empty texts and refuses them, "skip" leaves them out.
        overwrite: start over where another import of the split lies.
        progress: draw a progress bar.

    Raises:
        ValueError: the annotations are others, something is broken and refused, or an argument is out of range.
        FileNotFoundError: annotations or pictures are not there.
        FileExistsError: ``out`` holds other data.
    """
    settings, out = settings or PictureSettings(), Path(out).expanduser()
    _check_arguments(split, {"shard_size": shard_size, "workers": workers, "limit": limit}, on_bad)
    given = [annotations] if isinstance(annotations, (str, Path)) else list(annotations)
    files = find_annotations(given, layout.files(split))
    entries, note = _read(layout, files, split, limit)
    found = _find_pictures(entries, Path(images).expanduser())
    problems = list(_problems(found, layout))
    _settle(problems, on_bad)
    arguments = {"annotations": hash_of(files), "shard_size": shard_size, "limit": limit}
    arguments |= settings.plain() | dict(layout.options)
    begin(out, layout.name, split, arguments, overwrite)
    # Cut before anything is left out, so that a shard's pictures do not depend on what is missing in others.
    cuts = [found[k : k + shard_size] for k in range(0, len(found), shard_size)]
    jobs = [ShardJob(out / f"{split}-{k:03d}.tar", cut, layout.task, settings, on_bad) for k, cut in enumerate(cuts)]
    problems += run_jobs(jobs, workers, f"{layout.name} {split}", progress)
    _settle(problems, on_bad)
    result = _read_back(layout, [job.shard for job in jobs], entries, on_bad)
    finish(out, layout.name, split, arguments, result)
    images_there, texts, samples, left_out = (result[k] for k in ("images", layout.texts, "samples", "left_out"))
    return Imported([job.shard for job in jobs], images_there, texts, samples, left_out, problems, note)


def _check_arguments(split: str, counts: dict[str, int | None], on_bad: OnBad) -> None:
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {list(SPLITS)}, got {split!r}")
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"`{name}` must be at least 1, got {count}")
    BadSamples(on_bad)


def _read(layout: Layout, files: Sequence[Path], split: str, limit: int | None) -> tuple[list[Entry], str]:
    contents = {str(path): read_annotations(path) for path in files}
    names = " and ".join(contents)
    try:
        entries = list(islice(layout.parse(contents, split), limit))
    except (KeyError, TypeError, AttributeError) as error:
        wrong = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{names}: an annotation has not the official form ({wrong}); download it again") from error
    if not entries:
        raise ValueError(f"{names} holds no pictures of the split {split!r}; name the file of that split")
    refuse_twice((entry.key for entry in entries), "a picture")
    return entries, layout.note(contents)


def _find_pictures(entries: Sequence[Entry], folder: Path) -> Found:
    if not folder.is_dir():
        raise FileNotFoundError(f"no pictures: {folder} is not a folder")
    found = [(entry, locate(folder, entry.image)) for entry in entries]
    if not any(file for _, file in found):
        raise FileNotFoundError(
            f"no pictures: {folder} holds none of {len(found)} (first {entries[0].image!r}); name their folder with "
            "--images"
        )
    return found


def _problems(found: Found, layout: Layout) -> Iterator[str]:
    for entry, file in found:
        yield from entry.left_out
        if not entry.texts and not entry.left_out:
            yield f"{entry.key} has no {layout.texts}"
        if file is None:
            yield f"{entry.image}, the picture of {entry.key}, is missing"


def _settle(problems: Sequence[str], on_bad: OnBad) -> None:
    """Refuse what is broken, if it is to be refused."""
    if problems and on_bad == "raise":
        more = [f"and {len(problems) - NAMED} more"] if len(problems) > NAMED else []
        lines = "".join(f"\n  {line}" for line in [*problems[:NAMED], *more])
        raise ValueError(
            f"{len(problems)} pictures or texts are broken: repair them, or leave them out with --on_bad skip:{lines}"
        )


def _read_back(layout: Layout, shards: list[Path], entries: list[Entry], on_bad: OnBad) -> dict[str, Any]:
    """Read all shards as training does, and count."""
    texts, samples, there = 0, 0, set[str]()
    try:
        for place, data, record in read_shards(shards, BadSamples()):
            verify(data, place.shard, place.key)
            samples += len(make_samples(record, None, layout.task))
            texts += len(record[entries[0].field_name])
            there.add(place.key)
    except ValueError as error:
        raise ValueError(f"what was written cannot be read back: {error}; delete that shard and run again") from error
    left_out = [entry.key for entry in entries if entry.key not in there]
    if left_out and on_bad == "raise":
        raise ValueError(
            f"{len(left_out)} pictures, first {left_out[0]!r}, are not in the shards: an earlier run left them out; "
            "run with --on_bad skip too, or start over with --overwrite"
        )
    if not there:
        raise ValueError("every picture was left out, so there is nothing to train on; repair the data")
    return {
        "images": len(there),
        layout.texts: texts,
        "samples": samples,
        "left_out": len(left_out),
        "shards": [shard.name for shard in shards],
    }
