"""Known depths once more: the oracle's, which no rule can know, and a policy's own, without asking its signals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from lightning_mue.answers import Answers, answer
from lightning_mue.backbones import num_layers, view
from lightning_mue.benchmark.exam import PLACE, Exam
from lightning_mue.benchmark.lines import Done, Line
from lightning_mue.callbacks.batches import Batch
from lightning_mue.inference import ExitEngine, ExitOutput
from lightning_mue.inference.record import answer_positions
from lightning_mue.policy import ExitPolicy, ExitRule

Forced = list[list[list[int]]]
"""Batch -> row -> decoder depth of each token."""


class Replay:
    """Answers at known depths: no signal is asked.

    A stream before the decoder is left by a rule for a whole batch: where the rows of one left it at different layers,
    the policy's own rule is asked.

    Args:
        exam: what is answered.
        policy: whose depths they are.
        streams: stream -> exit depth of each sample; the others run at full depth.
        rows: sample -> decoder depth of each token.
    """

    def __init__(
        self, exam: Exam, policy: ExitPolicy, streams: Mapping[str, np.ndarray], rows: Sequence[Sequence[int]]
    ) -> None:
        self._exam, self._policy, self._streams, self._rows = exam, policy, streams, rows
        self._last = num_layers(view(exam.model))
        self._engines: dict[tuple[tuple[str, int], ...], ExitEngine] = {}

    @torch.inference_mode()
    def __call__(self, timings: bool, batch: Batch) -> ExitOutput:
        """Answer a batch that knows its ``PLACE``."""
        engine, forced = self._engine(batch[PLACE]), [self._rows[i] for i in batch[PLACE]]
        return engine.run(self._exam.max_new_tokens, self._exam.prefix, timings, batch, forced=forced)[0]

    def _engine(self, places: Sequence[int]) -> ExitEngine:
        """Return the engine that leaves the streams where these samples left them; it is made once."""
        found = {name: {int(depth_N[i]) for i in places} for name, depth_N in self._streams.items()}
        same = {name: depths.pop() for name, depths in found.items() if len(depths) == 1}
        key = tuple(same.items())
        if key not in self._engines:
            rules = {name: ExitRule.static(depth) for name, depth in same.items() if depth < self._last[name]}
            rules |= {name: self._policy.rules[name] for name in found if name not in same}
            policy = replace(self._policy, rules=rules, groups=None, verified=False)
            self._engines[key] = ExitEngine(self._exam.model, policy, check_fingerprint=False)
        return self._engines[key]


def ideal_line(exam: Exam, policy: ExitPolicy, answers: Answers, full: str | None = None, note: str = "") -> Line:
    """Return the line of a policy's depths, streams before the decoder included, with no signal asked.

    Args:
        exam: what is answered.
        policy: that was obeyed; with another K/V fill the tokens may be others.
        answers: that it gave.
        full: as of `Line`.
        note: as of `Line`.
    """
    streams = {name: depth_N for name, depth_N in answers.depths.items() if name != "decoder"}
    replay = Replay(exam, policy, streams, [row for rows in answers.by_row for row in rows])
    return Line(
        lambda batch: replay(False, batch).sequences, lambda _: answers, partial(replay, True), full, policy, note
    )


def oracle_line(exam: Exam, policy: ExitPolicy, forced: Forced, full: str | None = None, note: str = "") -> Line:
    """Return the line of given decoder depths.

    Args:
        exam: what is answered.
        policy: full depth, in the precision and runtime that the depths are for.
        forced: the depths.
        full: as of `Line`.
        note: as of `Line`.
    """
    replay = Replay(exam, policy, {}, [row for rows in forced for row in rows])

    def decode(done: Done) -> Answers:
        return answer(exam.model, policy, exam.batches, exam.data, exam.score, forced, done)

    return Line(lambda batch: replay(False, batch).sequences, decode, partial(replay, True), full, policy, note)


@torch.inference_mode()
def oracle_depths(exam: Exam, policy: ExitPolicy, layers: Sequence[int]) -> Forced:
    """Return the first exit that chooses each full-depth token; the last layer if none does.

    Args:
        exam: what is answered.
        policy: full depth, in a precision and runtime.
        layers: of the decoder's exits.
    """
    engine, found = ExitEngine(exam.model, policy, check_fingerprint=False), []
    for batch in exam.batches:
        out, executor = engine.run(exam.max_new_tokens, exam.prefix, False, batch)
        tokens_BT = out.sequences[:, 1:]
        depth_BT = torch.full_like(tokens_BT, executor.num_layers)
        for rows, step, position in answer_positions(out.prompt_lengths.numpy(), tokens_BT.shape[1]):
            index = torch.from_numpy(rows).to(tokens_BT.device)
            for k in sorted(layers, reverse=True):
                said_R = torch.as_tensor(executor.exit_logits(k, index, position)).argmax(-1)
                agrees_R = said_R == tokens_BT[index, step]
                depth_BT[index[agrees_R], step] = k
        taken_BT = out.exit_depths["decoder"] > 0
        found.append([depth_T[keep_T].tolist() for depth_T, keep_T in zip(depth_BT, taken_BT, strict=True)])
    return found
