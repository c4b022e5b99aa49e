"""WebDataset shards read safely: pictures and JSON only, everything broken named with shard and sample."""

from __future__ import annotations

import glob
import json
import tarfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from webdataset.tariterators import group_by_keys

from lightning_mue.data.images import decode

PICTURE_ENDINGS = ("png", "jpg", "jpeg", "webp")
OnBad = Literal["raise", "skip"]


@dataclass(frozen=True)
class Picture:
    """Where one picture lies: the bytes of a member inside an uncompressed shard.

    Args:
        shard: the tar.
        key: the sample's key in it.
        offset: first byte.
        size: number of bytes.
    """

    shard: Path
    key: str
    offset: int
    size: int

    def load(self) -> Image.Image:
        """Reads and decodes the picture.

        Raises:
            ValueError: the bytes are no picture; the message names shard and sample.
        """
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            return decode(file.read(self.size), self.shard, self.key)


@dataclass
class BadSamples:
    """What to do with broken shards and samples, and what was found.

    Args:
        on_bad: "raise" refuses the first one, "skip" leaves it out and counts it.
        messages: one line for each that was skipped.
    """

    on_bad: OnBad = "raise"
    messages: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.on_bad not in ("raise", "skip"):
            raise ValueError(f'`on_bad` must be "raise" or "skip", got {self.on_bad!r}')

    def meet(self, error: ValueError) -> None:
        """Raises the error, or notes it."""
        if self.on_bad == "raise":
            raise error
        self.messages.append(str(error))

    def warn(self, since: int = 0) -> None:
        """Says how many were skipped after the first ``since``, and names three."""
        if new := self.messages[since:]:
            warnings.warn(f"{len(new)} broken shards or samples were skipped: {'; '.join(new[:3])}", stacklevel=2)


def find_shards(where: str | Path | Sequence[str | Path], split: str) -> list[Path]:
    """Finds shards.

    Args:
        where: a folder (its ``<split>-*.tar``), a file, a glob, or a list of these.
        split: name of the split that is asked for.

    Returns:
        The shards in order of name, none twice.

    Raises:
        FileNotFoundError: nothing is there.
    """
    parts = [where] if isinstance(where, (str, Path)) else list(where)
    found: list[Path] = []
    for part in parts:
        path = Path(part).expanduser()
        if path.is_dir():
            here = sorted(path.glob(f"{split}-*.tar"))
        elif path.is_file():
            here = [path]
        else:
            here = sorted(Path(name) for name in glob.glob(str(path)))
        if not here:
            wanted = f"a folder with {split}-*.tar, a tar, or a glob"
            raise FileNotFoundError(f"no {split} data: {part!s} matches no shard; give {wanted}")
        found += here
    if not found:
        raise FileNotFoundError(f"no {split} data: the list of shards is empty")
    return list(dict.fromkeys(found))


def read_shards(shards: Sequence[Path], bad: BadSamples) -> Iterator[tuple[Picture, bytes, dict[str, Any]]]:
    """Reads samples in order: where the picture lies, its bytes (not decoded yet), its record.

    Nothing in a shard is ever unpickled.

    Args:
        shards: uncompressed tars, each sample one picture and one ``.json`` of the same key.
        bad: what to do with broken ones.

    Raises:
        ValueError: something is broken and ``bad`` refuses it; or a member is neither picture nor JSON, whatever
            ``bad`` says.
    """
    for shard in shards:
        for sample in group_by_keys(_members(shard, bad), handler=partial(_twice, shard, bad)):
            try:
                yield _picture_and_record(shard, sample)
            except ValueError as error:
                bad.meet(error)


def _members(shard: Path, bad: BadSamples) -> Iterator[dict[str, Any]]:
    """The shard's files as WebDataset's grouping wants them, each with its place in the tar as data."""
    last = "the beginning"
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if not member.isreg() or Path(member.name).name.startswith("__"):  # WebDataset's mark of metadata
                    continue
                _check_ending(shard, member.name)
                file = tar.extractfile(member)
                data = file.read() if file else b""
                if len(data) != member.size:
                    raise tarfile.ReadError("unexpected end of data")
                last = repr(member.name)
                yield {"fname": member.name, "data": (member.offset_data, data), "__url__": str(shard)}
            _check_end(shard, tar.offset)
    except (tarfile.TarError, OSError, EOFError) as error:
        bad.meet(ValueError(f"shard {shard} is truncated or no tar, after {last}: {error}; write or copy it again"))


def _twice(shard: Path, bad: BadSamples, error: Exception) -> bool:
    """Handler of the one error that grouping knows: the same file name twice. Skipping keeps the first."""
    bad.meet(ValueError(f"shard {shard}: {error.args[0]}"))
    return True


def _check_ending(shard: Path, name: str) -> None:
    ending = name.rpartition(".")[2].lower()
    if ending != "json" and ending not in PICTURE_ENDINGS:
        allowed = " ".join(f".{known}" for known in (*PICTURE_ENDINGS, "json"))
        raise ForbiddenMemberError(
            f"shard {shard} holds the member {name!r}: only {allowed} are read (others may run code when "
            "decoded); write the shard without it"
        )


def _check_end(shard: Path, end: int) -> None:
    """A tar cut between two members looks whole but for the blocks of zeros that must follow."""
    with shard.open("rb") as file:
        file.seek(end)
        rest = file.read(2 * tarfile.BLOCKSIZE)
    if len(rest) < 2 * tarfile.BLOCKSIZE or any(rest):
        raise tarfile.ReadError("the end-of-archive mark is missing")


class ForbiddenMemberError(ValueError):
    """A shard holds a file that is neither picture nor JSON."""


def _picture_and_record(shard: Path, sample: dict[str, Any]) -> tuple[Picture, bytes, dict[str, Any]]:
    key = sample["__key__"]
    endings = [ending for ending in PICTURE_ENDINGS if ending in sample]
    if "json" not in sample or len(endings) != 1:
        has = sorted(name for name in sample if not name.startswith("__"))
        raise ValueError(f"sample {key!r} of {shard} must be one picture and one .json, got {has}")
    offset, data = sample[endings[0]]
    try:
        record = json.loads(sample["json"][1])
    except ValueError as error:
        raise ValueError(f"sample {key!r} of {shard} has broken JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"sample {key!r} of {shard}: its JSON must be an object, got {type(record).__name__}")
    return Picture(shard, key, offset, len(data)), data, record
