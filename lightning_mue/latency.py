"""The latency table: what each piece of the work costs on one device, in milliseconds, at batch 1. Pure data."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from lightning_mue.files import write_text

SCHEMA = 1


@dataclass(frozen=True)
class StreamLatency:
    """Milliseconds of a stream that is left once per sample (vision, encoder).

    ``fixed_ms`` is prologue + epilogue (always run), ``layer_ms`` one layer, ``signal_ms`` one exit decision by signal,
    ``exit_ms`` what leaving early adds (the adapter); ``exit_ms_of`` the same for signals that made what leaving gives
    already: less than nothing.
    """

    fixed_ms: float
    layer_ms: float
    signal_ms: Mapping[str, float] = field(default_factory=dict)
    exit_ms: float = 0.0
    exit_ms_of: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class DecoderLatency:
    """Milliseconds of the decoder.

    ``layer_ms[i]`` is one layer over a block of ``block_sizes[i]`` pending positions; ``cross_ms`` the cross-attention
    K/V projection of one layer, paid when the layer is first reached; ``step_ms`` what each step pays at any depth
    (embedding, vocabulary head, bookkeeping), ``exit_ms`` what leaving early adds by signal: the adapter, or less than
    nothing where the signal computed the exit's logits already. The first ``base_layers`` layers read no memory and are
    never left: one of them costs ``base_ms[i]``, and the others are those of ``layer_ms`` (CoCa's two halves).
    """

    block_sizes: tuple[int, ...]
    layer_ms: tuple[float, ...]
    cross_ms: float
    step_ms: float
    signal_ms: Mapping[str, float] = field(default_factory=dict)
    exit_ms: Mapping[str, float] = field(default_factory=dict)
    base_layers: int = 0
    base_ms: tuple[float, ...] = ()

    def layer_cost(self, pending: np.ndarray, base: bool = False) -> np.ndarray:
        """Return the ms of one layer on ``pending`` positions (0 costs 0): linear between and beyond measured sizes."""
        layer_ms = self.base_ms if base else self.layer_ms
        cost = np.interp(pending, self.block_sizes, layer_ms)
        if len(self.block_sizes) > 1:
            (before, last), (cheaper, dearest) = self.block_sizes[-2:], layer_ms[-2:]
            cost = cost + np.maximum(pending - last, 0) * max(0.0, (dearest - cheaper) / (last - before))
        return np.where(pending > 0, cost, 0.0)


@dataclass(frozen=True)
class LatencyTable:
    """Measured costs by stream, and where they were measured."""

    streams: Mapping[str, StreamLatency]
    decoder: DecoderLatency
    device: str = ""
    threads: int = 0

    def to_json(self) -> str:
        """Return the table as JSON."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1, sort_keys=True) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as JSON."""
        write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LatencyTable:
        """Read a table from a JSON file."""
        return cls.from_json(Path(path).read_text(encoding="utf-8"), str(path))

    @classmethod
    def from_json(cls, text: str, source: str = "the latency table") -> LatencyTable:
        """Read a table; ``source`` names it in errors.

        Raises:
            ValueError: not JSON, another schema, or no latency table.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{source} is not JSON ({error}); measure the latency again.") from error
        if not isinstance(data, dict) or data.pop("schema", None) != SCHEMA:
            raise ValueError(f"{source} must be a latency table of schema {SCHEMA}; measure it again.")
        try:
            decoder = data["decoder"]
            decoder |= {k: tuple(decoder[k]) for k in ("block_sizes", "layer_ms", "base_ms") if k in decoder}
            streams = {k: StreamLatency(**v) for k, v in data["streams"].items()}
            return cls(streams, DecoderLatency(**decoder), data["device"], data["threads"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{source} must hold a latency table; an entry is missing or wrong: {error}") from error
