"""Shards as jobs: each is written by one process, so that the number of processes changes no byte."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import track

from lightning_mue.data.importers.entry import Entry
from lightning_mue.data.importers.pictures import PictureSettings, prepare
from lightning_mue.data.writer import write_shard

if TYPE_CHECKING:
    from lightning_mue.data.shards import OnBad


@dataclass(frozen=True)
class ShardJob:
    """One shard to write.

    Args:
        shard: the tar.
        pictures: entries with their files; those without file or texts are left out.
        task: of the records.
        settings: how pictures are written.
        on_bad: "raise" writes no shard that would lack an unreadable picture.
    """

    shard: Path
    pictures: Sequence[tuple[Entry, Path | None]]
    task: str
    settings: PictureSettings
    on_bad: OnBad


class _Bad(Exception):
    """Ends a shard that must not be written."""


def run_jobs(jobs: Sequence[ShardJob], workers: int, title: str, progress: bool) -> list[str]:
    """Write the shards that are not there yet.

    Args:
        jobs: all shards.
        workers: processes.
        title: of the progress bar.
        progress: draw it.

    Returns:
        One line for each picture that cannot be read.
    """
    missing = [job for job in jobs if not job.shard.exists()]

    def tracked(done: Iterable[Any]) -> Iterable[Any]:
        return track(done, title, total=len(missing), disable=not progress)

    if workers == 1:
        return [line for lines in tracked(map(run_job, missing)) for line in lines]
    # Spawned: a fork would copy locks of torch and of the progress bar as they happen to stand.
    with ProcessPoolExecutor(min(workers, len(missing) or 1), get_context("spawn"), _begin_worker) as pool:
        futures = [pool.submit(run_job, job) for job in missing]
        try:
            for future in tracked(as_completed(futures)):
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [line for future in futures for line in future.result()]


def run_job(job: ShardJob) -> list[str]:
    """Write one shard; return one line for each picture that cannot be read."""
    problems: list[str] = []

    def samples() -> Iterator[tuple[str, str, bytes, dict[str, Any]]]:
        for entry, file in job.pictures:
            if file is None or not entry.texts:
                continue
            try:
                ending, data = prepare(file, entry.key, job.settings)
            except ValueError as error:
                problems.append(str(error))
                continue
            yield entry.key, ending, data, entry.record(job.task)
        if problems and job.on_bad == "raise":
            raise _Bad

    with contextlib.suppress(_Bad):
        write_shard(job.shard, samples())
    return problems


def _begin_worker() -> None:
    """End at once on Ctrl-C, and with the process that asked for the work, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    def watch() -> None:
        if (parent := parent_process()) is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
