"""Traces: what one full-depth pass recorded, so that any policy can be simulated without the model.

Arrays use these axes: ``n`` samples, ``T`` decoding steps, ``E`` exits of a stream (the last layer is not an exit).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

SCHEMA = "lightning_mue.trace/3"


@dataclass
class StreamTrace:
    """One stream's exits, seen on every sample.

    Args:
        layers: the exit layers, counted from 1, ``E`` of them.
        num_layers: layers at full depth.
        scores: signal -> float32 array, ``[n, E]`` (vision, encoder) or ``[n, T, E]`` (decoder), higher = safer.
        agree: decoder only, bool ``[n, T, E]``: the exit's token equals the full-depth token of that step.
        score_at: metric -> score ``[n, E]`` when this stream alone always leaves at the exit.
        same_at: bool ``[n, E]``: the whole output equals the full-depth output when this stream alone leaves there.
    """

    layers: tuple[int, ...]
    num_layers: int
    scores: dict[str, np.ndarray]
    score_at: dict[str, np.ndarray]
    same_at: np.ndarray
    agree: np.ndarray | None = None


@dataclass
class Trace:
    """Everything a full-depth pass recorded.

    Args:
        sample_ids: ``n`` distinct names.
        clusters: ``n`` names of the sources (pictures); samples of one cluster are dependent.
        groups: ``n`` names of the groups that promises may be about; "" where there are none.
        full_score: metric -> score of the full-depth output, float64 ``[n]``; nothing without references.
        lengths: tokens decoded at full depth (end token included), int ``[n]``.
        prompts: tokens of the decoder prompt, which the decoder's layers run over first, int ``[n]``.
        streams: stream name -> StreamTrace.
        meta: plain JSON values: decode settings, fingerprint of the weights, data fingerprint.
    """

    sample_ids: list[str]
    clusters: list[str]
    groups: list[str]
    full_score: dict[str, np.ndarray]
    lengths: np.ndarray
    prompts: np.ndarray
    streams: dict[str, StreamTrace]
    meta: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.sample_ids)

    def select(self, keep: np.ndarray) -> Trace:
        """Return the trace of the samples at the indices (or under the mask) ``keep``, in that order."""
        index = np.flatnonzero(keep) if keep.dtype == bool else keep
        streams = {
            name: StreamTrace(
                s.layers,
                s.num_layers,
                {k: v[index] for k, v in s.scores.items()},
                {k: v[index] for k, v in s.score_at.items()},
                s.same_at[index],
                None if s.agree is None else s.agree[index],
            )
            for name, s in self.streams.items()
        }
        return Trace(
            [self.sample_ids[i] for i in index],
            [self.clusters[i] for i in index],
            [self.groups[i] for i in index],
            {k: v[index] for k, v in self.full_score.items()},
            self.lengths[index],
            self.prompts[index],
            streams,
            self.meta,
        )

    @staticmethod
    def merge(parts: Sequence[Trace]) -> Trace:
        """Join traces of several batches, shards or ranks: sorted by sample id, repeats (sampler padding) dropped.

        Raises:
            ValueError: no part, or parts of different models, exits or settings.
        """
        parts = [p for p in parts if len(p)]
        if not parts:
            raise ValueError("There is no trace to merge: no rank saw any sample.")
        first = parts[0]
        for part in parts[1:]:
            if part._made_of() != first._made_of():
                raise ValueError("Traces of different models, exits or settings cannot be merged; collect them again.")
        steps = max(int(p.lengths.max()) for p in parts)
        ids = [i for p in parts for i in p.sample_ids]
        streams = {name: _concat([p.streams[name] for p in parts], steps) for name in first.streams}
        joined = Trace(
            ids,
            [c for p in parts for c in p.clusters],
            [g for p in parts for g in p.groups],
            {metric: np.concatenate([p.full_score[metric] for p in parts]) for metric in first.full_score},
            np.concatenate([p.lengths for p in parts]),
            np.concatenate([p.prompts for p in parts]),
            streams,
            first.meta,
        )
        _, index = np.unique(np.array(ids), return_index=True)  # sorted by id, first occurrence wins
        return joined.select(index)

    def _made_of(self) -> Any:
        """Return what traces that can be joined have in common."""
        return self.meta, sorted(self.full_score), {k: (s.layers, s.num_layers) for k, s in self.streams.items()}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the trace as one safetensors file with a JSON header (aside, then renamed)."""
        arrays = {"lengths": self.lengths, "prompts": self.prompts}
        arrays |= {f"full_score.{metric}": scores for metric, scores in self.full_score.items()}
        names = {"sample_ids": self.sample_ids, "clusters": self.clusters, "groups": self.groups}
        header: dict[str, Any] = names | {"meta": self.meta}
        header["streams"] = {n: {"layers": list(s.layers), "num_layers": s.num_layers} for n, s in self.streams.items()}
        for name, s in self.streams.items():
            arrays |= {f"{name}.scores.{k}": v for k, v in s.scores.items()}
            arrays |= {f"{name}.score_at.{k}": v for k, v in s.score_at.items()} | {f"{name}.same_at": s.same_at}
            if s.agree is not None:
                arrays[f"{name}.agree"] = s.agree
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{token_hex(8)}")
        arrays = {k: np.ascontiguousarray(v) for k, v in arrays.items()}
        # One metadata key: safetensors writes several in random order, and equal traces should be equal files.
        save_file(arrays, aside, metadata={"trace": json.dumps({"format": SCHEMA, **header}, sort_keys=True)})
        os.replace(aside, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trace:
        """Read a trace.

        Raises:
            ValueError: the file is truncated or is no trace.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                header = json.loads((file.metadata() or {}).get("trace", "{}"))
                arrays = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a readable trace ({error}); collect it again.") from error
        if header.get("format") != SCHEMA:
            raise ValueError(f"{path} must hold a trace ({SCHEMA}), found {header.get('format')!r}")
        streams = {}
        for name, s in header["streams"].items():
            streams[name] = StreamTrace(
                tuple(s["layers"]),
                s["num_layers"],
                _named(arrays, f"{name}.scores."),
                _named(arrays, f"{name}.score_at."),
                arrays[f"{name}.same_at"],
                arrays.get(f"{name}.agree"),
            )
        ids, clusters, groups = (header[name] for name in ("sample_ids", "clusters", "groups"))
        scores, lengths, prompts = _named(arrays, "full_score."), arrays["lengths"], arrays["prompts"]
        return cls(ids, clusters, groups, scores, lengths, prompts, streams, header["meta"])


def _named(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Return the arrays whose names begin so, under the rest of their names."""
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _concat(parts: Sequence[StreamTrace], steps: int) -> StreamTrace:
    """Join one stream's parts over samples; decoder arrays are padded (0, False) to ``steps``."""

    def join(arrays: list[np.ndarray], stepwise: bool) -> np.ndarray:
        if stepwise:
            arrays = [np.pad(a[:, :steps], ((0, 0), (0, max(0, steps - a.shape[1])), (0, 0))) for a in arrays]
        return np.concatenate(arrays)

    stepwise = parts[0].agree is not None
    return StreamTrace(
        parts[0].layers,
        parts[0].num_layers,
        {k: join([p.scores[k] for p in parts], stepwise) for k in parts[0].scores},
        {k: join([p.score_at[k] for p in parts], False) for k in parts[0].score_at},
        join([p.same_at for p in parts], False),
        join([p.agree for p in parts if p.agree is not None], True) if stepwise else None,
    )
