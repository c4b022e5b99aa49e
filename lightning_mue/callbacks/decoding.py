"""Real decoding of a split: what a rehearsal and a certificate rest on."""

from __future__ import annotations

from collections.abc import Collection, Container, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np

from lightning_mue.backbones import view
from lightning_mue.calibration.decoded import Decoded
from lightning_mue.callbacks.batch_keys import BatchKeys
from lightning_mue.callbacks.batches import Batch, answer_constraint, content, on_device
from lightning_mue.callbacks.journal import Journal
from lightning_mue.callbacks.ranks import gather
from lightning_mue.callbacks.scoring import Scoring
from lightning_mue.callbacks.split_reader import SplitReader
from lightning_mue.inference import ExitEngine
from lightning_mue.inference.record import record
from lightning_mue.policy import ExitPolicy
from lightning_mue.trace import Trace

FULL = ExitPolicy.full_depth()
Row = dict[str, Any]
"""What one sample came to, in plain values."""

SAME_SAMPLES = (
    "every pass must give the same samples: no random augmentation, and no shuffling with `limit_val_batches`."
)

_DOING = {"propose": "rehearsing", "certify": "decoding"}


class SplitDecoder:
    """Decodes a policy on this rank's batches of one split with the engine that ships, and gathers all ranks'.

    Results go through the journal, so that an interrupted calibration goes on where it was.

    Args:
        trainer: whose validation data is decoded.
        model: the backbone.
        scoring: of the answers.
        max_new_tokens: of each answer.
        journal: keeps what was decoded.
        keys: of the batches.
        split: ``certify``, or ``propose``: the rest.
        groups: only samples of these are decoded; None: all.
        runtime: what runs the layers.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        model: Any,
        scoring: Scoring,
        max_new_tokens: int | None,
        journal: Journal,
        keys: BatchKeys,
        split: str = "certify",
        groups: Container[str] | None = None,
        runtime: str = "torch",
    ) -> None:
        self._model, self._scoring, self._split = model, scoring, split
        self._max_new_tokens, self._journal, self._runtime = max_new_tokens, journal, runtime
        backbone = view(model)
        self.reader = SplitReader(trainer, keys, backbone.generate_inputs, split, groups)
        self._prefix_fn = answer_constraint(trainer, backbone.decode_settings(max_new_tokens).end_ids[0])
        self._full = dict[str, Row]()

    def __call__(self, policy: ExitPolicy, unchanged: Collection[str] = ()) -> Decoded:
        """Decode the split under ``policy``; full depth must come first.

        Samples that are known to come out ``unchanged`` are not decoded again.
        """
        engine = ExitEngine(self._model, policy, check_fingerprint=False, runtime=self._runtime)
        mine: list[dict[str, Any]] = []
        for batch in self.reader.read(doing(self._split, policy), unchanged):
            parts = [policy.to_json(), content(batch), self._runtime]
            mine.append(self._journal.piece("decoded", parts, partial(self._decode, engine, batch)))
        rows = [row for piece in gather(mine) for row in piece["rows"]]
        if policy.is_full_depth:
            self._full = {row["id"]: row for row in rows}
        return joined([*rows, *(self._full[name] for name in unchanged)], self._full)

    def signals(self) -> list[Path]:
        """Record the decoder's exits on the split; return the files of all ranks."""
        paths = [
            self._journal.trace("decoder", [content(batch)], partial(self._record, batch))
            for batch in self.reader.read("recording the decoder's exits")
        ]
        return sorted(set(gather(paths)))

    def _decode(self, engine: ExitEngine, batch: Batch) -> dict[str, Any]:
        tensors = on_device(batch, self._model)
        groups = batch["group"] if engine.policy.groups is not None else None
        output = engine.generate(self._max_new_tokens, self._prefix_fn, groups=groups, **tensors)
        scores, counts = self._scoring.of(batch)(output.sequences), self._scoring.counts(batch, output.sequences)
        steps = (output.exit_depths["decoder"] > 0).sum(1).tolist()
        tokens = [output.sequences[i, 1 : count + 1].tolist() for i, count in enumerate(steps)]
        return {"rows": rows_of_samples(batch, tokens, scores, counts)}

    def _record(self, batch: Batch) -> Trace:
        tensors, names = on_device(batch, self._model), (batch["sample_id"], batch["cluster"])
        how: dict[str, Any] = {"max_new_tokens": self._max_new_tokens, "prefix_fn": self._prefix_fn}
        how |= {"meta": self._journal.key, "groups": batch["group"], "only_decoder": True}
        return record(self._model, tensors, *names, lambda sequences: {}, **how)


def doing(split: str, policy: ExitPolicy) -> str:
    """Return what is said beside the progress of decoding a split."""
    return f"{_DOING[split]}: {policy.depths_in_words()[:60]}"


def rows_of_samples(
    batch: Batch, outputs: Sequence[Any], scores: Mapping[str, Sequence[float]], counts: Mapping[str, Sequence[Any]]
) -> list[Row]:
    """Return what each sample of a batch came to: its output is compared with that of full depth."""
    rows = []
    for i, sample_id in enumerate(batch["sample_id"]):
        of_row, counted = ({metric: values[i] for metric, values in found.items()} for found in (scores, counts))
        names = {"id": sample_id, "cluster": batch["cluster"][i], "group": batch["group"][i]}
        rows.append({**names, "tokens": outputs[i], "scores": of_row, "counts": counted})
    return rows


def check_samples(found: Sequence[str], before: Collection[str]) -> None:
    """Refuse a pass that gave others than the samples before.

    Raises:
        ValueError: which.
    """
    for names, others, when in ((found, before, "now and not before"), (before, found, "before and not now")):
        if other := sorted({*names} - {*others}):
            raise ValueError(f"The validation data gave sample {other[0]!r} {when}; {SAME_SAMPLES}")


def joined(rows: Sequence[Row], full: Mapping[str, Row]) -> Decoded:
    """Return the decoding of a split, beside the rows of full depth by sample.

    Raises:
        ValueError: other samples than full depth has seen.
    """
    check_samples([row["id"] for row in rows], full)
    return Decoded(
        [row["id"] for row in rows],
        [row["cluster"] for row in rows],
        _columns(rows, "scores"),
        np.array([row["tokens"] == full[row["id"]]["tokens"] for row in rows]),
        [row["group"] for row in rows],
        _columns(rows, "counts"),
    )


def _columns(rows: Sequence[Row], what: str) -> dict[str, np.ndarray]:
    """Return metric -> what was found of each sample, ``[n]`` or ``[n, K]``."""
    metrics = rows[0][what] if rows else ()
    return {metric: np.array([row[what][metric] for row in rows], np.float64) for metric in metrics}
