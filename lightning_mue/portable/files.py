"""A bundle's graphs and weights on disk, read without torch: sessions by name, arrays by name."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from lightning_mue.inference.int8_product import PROBE, largest_weight
from lightning_mue.inference.session import Session
from lightning_mue.portable.names import GRAPH_FOLDER, GRAPH_WEIGHTS, GRAPHS

SCHEMA = 2
PROBE_GRAPH = "int8/probe"
"""A product of 8 bits, with which a machine is asked how it multiplies."""
_TYPES = {"F32": np.float32, "I8": np.int8, "U8": np.uint8, "I32": np.int32, "I64": np.int64}
"""What safetensors calls a type; graphs hold no others."""

Array = np.ndarray


class GraphFiles:
    """The graphs of a bundle. Weights lie there once, and stay on disk until a session reads them.

    Args:
        folder: of the bundle; its files are taken to be those that were written.
        threads: of one call; as many as this process may use if not given.

    Attributes:
        facts: what ``graphs.json`` says of the model.

    Raises:
        ValueError: graphs of another schema, or of weights that overflow on this machine.
    """

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        self.facts: dict[str, Any] = json.loads((folder / GRAPHS).read_text(encoding="utf-8"))
        if (found := self.facts.get("schema")) != SCHEMA:
            raise ValueError(f"{folder / GRAPHS} must be of schema {SCHEMA}, got {found!r}; freeze the model again.")
        self.threads = threads or _cores()
        self._folder, self._graphs = folder / GRAPH_FOLDER, self.facts["graphs"]
        self._arrays = _read_safetensors(folder / GRAPH_WEIGHTS)
        self.session = cache(self._session)
        self._check_levels()

    def __contains__(self, name: str) -> bool:
        """Whether there is a graph of this name; what changes nothing has none."""
        return name in self._graphs

    def graph(self, name: str) -> bytes:
        """Return a graph without its weights.

        Raises:
            ValueError: it is said to lie elsewhere.
        """
        file = self._graphs[name]["file"]
        if Path(file).name != file:
            raise ValueError(f"{GRAPHS} names {file!r}, which lies outside the bundle's {GRAPH_FOLDER!r}")
        return (self._folder / file).read_bytes()

    def array(self, name: str) -> Array:
        """Return an array of those that no graph holds."""
        return self._arrays[self.facts["arrays"][name]]

    def _check_levels(self) -> None:
        if (levels := self.facts["levels"]) is None:
            return
        largest = largest_weight(self.graph(PROBE_GRAPH), *PROBE)
        if largest is None or largest < levels:
            raise ValueError(
                f"The bundle's weights of 8 bits go up to {levels}, and this machine adds their products exactly up to "
                f"{largest or 'none'} (x86 without VNNI); freeze the model on such a machine, or in float32."
            )

    def _session(self, name: str) -> Session:
        weights = {place: self._arrays[which] for place, which in self._graphs[name]["weights"].items()}
        return Session(self.graph(name), self.threads, weights)


def _cores() -> int:
    if asked := os.environ.get("OMP_NUM_THREADS"):
        return int(asked.partition(",")[0])
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _read_safetensors(path: Path) -> dict[str, Array]:
    """Return name -> array; nothing is read yet but the names.

    Raises:
        ValueError: sizes, places or types that cannot be.
    """
    size = path.stat().st_size
    data = np.memmap(path, np.uint8, "r") if size > 8 else np.zeros(8, np.uint8)
    start = 8 + int(data[:8].view("<u8")[0])
    if not 8 < start <= size:
        raise ValueError(f"{path} is damaged: {size} bytes, and a list of names that would end at {start}")
    arrays = {}
    for name, entry in json.loads(data[8:start].tobytes()).items():
        if name == "__metadata__":
            continue
        (first, last), kind = entry["data_offsets"], entry["dtype"]
        if kind not in _TYPES or not 0 <= first <= last <= size - start:
            raise ValueError(f"{path} is damaged: {name!r} is {kind} at {first} to {last} of {size - start} bytes")
        arrays[name] = np.frombuffer(data[start + first : start + last], _TYPES[kind]).reshape(entry["shape"])
    return arrays
