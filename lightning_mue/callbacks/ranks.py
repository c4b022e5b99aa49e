"""What ranks say to one another while they calibrate, and nothing else than this: items, or why one stops.

A rank that stops says so in the place of its next word, so the others, who wait for that word, stop too and know why.
Whatever the callbacks exchange goes through `gather`: then every rank has said the same number of words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

Asked = TypeVar("Asked")
Found = TypeVar("Found")

AGAIN = "The same command again goes on from what is in the journal."


class RankFailed(RuntimeError):
    """Another rank has stopped, so this one cannot go on."""


def gather(items: list[Any]) -> list[Any]:
    """Return the items of all ranks, in order of rank; every rank must call this equally often.

    Raises:
        RankFailed: a rank has stopped, has died, or did not answer within the process group's timeout.
    """
    said = _say((items, None))
    if stopped := [f"rank {rank} stopped: {why}" for rank, (_, why) in enumerate(said) if why is not None]:
        raise RankFailed(f"{'; '.join(stopped)}. {AGAIN}")
    return [item for part, _ in said for item in part]


def lead(work: Callable[[Callable[[Asked], Found]], Any], together: Callable[[Asked], Found]) -> Any:
    """Do ``work`` on rank 0 alone; whenever it calls what it is given, all ranks call ``together``.

    So what is computed from gathered numbers is computed once, and ranks on unlike machines, whose sums may differ in
    the last bit, cannot choose different things to do next. An error on one rank is the end of all.

    Args:
        work: gets ``together``, as it is to be called, and returns a value that can be pickled.
        together: takes what ``work`` asked for; it may `gather`.

    Returns:
        What ``work`` returned, on all ranks.
    """
    try:
        return _lead(work, together) if _rank() == 0 else _follow(together)
    except RankFailed:
        raise
    except Exception as error:
        with suppress(RankFailed):  # the others stop in any case
            _say(([], f"{type(error).__name__}: {error}"))
        raise


def _lead(work: Callable[[Callable[[Asked], Found]], Any], together: Callable[[Asked], Found]) -> Any:
    def ask(asked: Asked) -> Found:
        gather([(False, asked)])
        return together(asked)

    return gather([(True, work(ask))])[0][1]


def _follow(together: Callable[[Asked], Found]) -> Any:
    while True:
        ((is_done, said),) = gather([])
        if is_done:
            return said
        together(said)


def check_visible(paths: Sequence[Path]) -> None:
    """Check that what all ranks wrote can be read here.

    Raises:
        FileNotFoundError: some of it cannot.
    """
    if missing := [path for path in paths if not path.exists()]:
        raise FileNotFoundError(
            f"Of {len(paths)} files that the ranks have written, rank {_rank()} does not see {len(missing)}, such as "
            f"{missing[0]}: `default_root_dir` (or `folder`) must lie on a file system that all nodes share."
        )


def refuse_sharded(model: nn.Module) -> None:
    """Refuse a model of which a rank holds only a part.

    Its layers run only when all ranks run them, and with exits each rank leaves at a layer of its own.

    Args:
        model: as the strategy holds it (``trainer.model``): FSDP may wrap it from outside.

    Raises:
        ValueError: it is sharded.
    """
    if how := _sharded_by(model):
        raise ValueError(
            f"Calibration needs the whole model on every rank, and {how}: ranks that leave at different layers would "
            "wait for each other for ever. Write the weights to one file (docs/cluster.md says how) and calibrate "
            "that with `--trainer.strategy ddp`, or on one device."
        )


def _sharded_by(model: nn.Module) -> str:
    """Return what has sharded a model, in words; nothing if it is whole."""
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return "FSDP wraps this one"
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) and any(not placement.is_replicate() for placement in parameter.placements):
            return f"{name} is sharded (FSDP2 or tensor parallel)"
        if hasattr(parameter, "ds_id"):
            return f"{name} is partitioned by DeepSpeed ZeRO-3"
    return ""


def _say(words: Any) -> list[Any]:
    """Return what all ranks say."""
    if _size() == 1:
        return [words]
    everyone: list[Any] = [None] * _size()
    try:
        torch.distributed.all_gather_object(everyone, words)
    except RuntimeError as error:
        raise RankFailed(
            f"Rank {_rank()} waited for the others, and one of them has died or did not answer in time; its own output "
            f"says why ({error}). {AGAIN}"
        ) from error
    return everyone


def _rank() -> int:
    return torch.distributed.get_rank() if _size() > 1 else 0


def _size() -> int:
    """Return the number of ranks; 1 without a process group."""
    is_there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if is_there else 1
