"""An engine watched in service: the answers to a small random share of requests are compared with full depth's."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lightning_mue.calibration.audits import Audits
from lightning_mue.calibration.watch import promised, watch_all
from lightning_mue.inference.engine import ExitEngine
from lightning_mue.inference.output import ExitOutput
from lightning_mue.inference.record import equal_rows
from lightning_mue.inference.rows import PrefixFn, constraint_of, rows_of
from lightning_mue.policy import ExitPolicy, chain_hash
from lightning_mue.promise import Promise

Scorer = Callable[[str, Any], float]
"""Scores an answer: text, references -> number, as ``lightning_mue.metrics.scorer(metric)`` does."""

Twice = tuple[np.ndarray, list[str], list[str]]
"""Requests answered twice: bool ``[n]``, the same output; the policy's texts; those of full depth."""


class WatchedEngine:
    """Answers as its engine does, and watches whether the policy keeps what was promised.

    Every request (a row of a batch) is drawn with probability ``share``, whatever its answer, and those drawn are
    answered again at full depth; the caller is given the policy's answers alone. What an alarm means: see `Watch`.

    Args:
        engine: obeys the policy.
        share: of requests to answer twice, in (0, 1].
        promises: to watch; those that the policy's certificate makes if none are given.
        confidence_level: of an alarm about any of them, in (0, 1).
        scorers: metric -> what scores an answer; for every promised metric but ``consistency``.
        file: keeps the state as JSON, written after every call by this process alone; if it is there, the watch goes on
            from it.
        seed: of the draws.

    Raises:
        ValueError: nothing is promised, a scorer is missing, or the file is not of this watch.
    """

    def __init__(
        self,
        engine: ExitEngine,
        share: float = 0.02,
        promises: Promise | Sequence[Promise] | None = None,
        confidence_level: float = 0.95,
        scorers: Mapping[str, Scorer] | None = None,
        file: str | os.PathLike[str] | None = None,
        seed: int = 0,
    ) -> None:
        certificate = engine.policy.certificate
        if promises is None:
            subjects = promised(certificate)
        else:
            subjects = [(promise, "") for promise in ([promises] if isinstance(promises, Promise) else promises)]
        self.engine, self.audits = engine, Audits(watch_all(subjects, confidence_level), share, seed)
        self._scorers = _checked(scorers or {}, self.audits.metrics, engine)
        full = ExitPolicy(certificate=certificate)  # decode settings that were certified hold at full depth too
        same = {"processor": engine.processor, "runtime": engine.runtime}
        self._full = ExitEngine(engine.original, full, check_fingerprint=False, **same)
        self._file, self._policy = Path(file) if file is not None else None, chain_hash([engine.policy])
        if self._file is not None and self._file.exists():
            self.audits.restore(self._file, self._policy)

    @property
    def alarm(self) -> bool:
        """Whether any promise was found broken; it stays so."""
        return self.audits.alarm

    def in_words(self) -> str:
        """Return what was found, a sentence for each promise and group."""
        return self.audits.in_words()

    def generate(
        self,
        max_new_tokens: int | None = None,
        prefix_allowed_tokens_fn: PrefixFn | None = None,
        timings: bool = False,
        groups: Sequence[str] | None = None,
        references: Sequence[Any] | None = None,
        **inputs: Any,
    ) -> ExitOutput:
        """Answer a batch as ``ExitEngine.generate`` does, and audit the rows that are drawn.

        Args:
            max_new_tokens: as there.
            prefix_allowed_tokens_fn: as there.
            timings: as there; audits are not in them.
            groups: as there; also for promises about one of them.
            references: of each row, for the scorers.
            **inputs: as there.

        Raises:
            ValueError: groups or references are needed and are not there for every row.
        """
        _check_greedy(inputs)
        output = self.engine.generate(max_new_tokens, prefix_allowed_tokens_fn, timings, groups, **inputs)

        def again(rows: list[int]) -> Twice:
            prefix_fn = constraint_of(prefix_allowed_tokens_fn, rows)
            full = self._full.generate(
                max_new_tokens, prefix_fn, **rows_of(inputs, self.engine.backbone.generate_inputs, rows)
            ).sequences
            mine = output.sequences[rows]
            pad_id = self.engine.backbone.decode_settings(None).pad_id
            return equal_rows(mine, full, pad_id).cpu().numpy(), self._texts(mine), self._texts(full)

        self._audit(len(output.sequences), again, groups, references)
        return output

    def answer(
        self,
        images: Sequence[Any],
        prompts: Sequence[str],
        max_new_tokens: int | None = None,
        decoder_prompts: Sequence[str] | None = None,
        groups: Sequence[str] | None = None,
        references: Sequence[Any] | None = None,
    ) -> list[str]:
        """Answer as ``ExitEngine.answer`` does, and audit the requests that are drawn; the output is the text.

        Args:
            images: as there.
            prompts: as there.
            max_new_tokens: as there.
            decoder_prompts: as there.
            groups: as there; also for promises about one of them.
            references: of each answer, for the scorers.

        Raises:
            ValueError: groups or references are needed and are not there for every answer.
        """
        texts = self.engine.answer(images, prompts, max_new_tokens, decoder_prompts, groups)

        def again(rows: list[int]) -> Twice:
            first = None if decoder_prompts is None else [decoder_prompts[i] for i in rows]
            full = self._full.answer([images[i] for i in rows], [prompts[i] for i in rows], max_new_tokens, first)
            mine = [texts[i] for i in rows]
            return np.array([a == b for a, b in zip(mine, full, strict=True)], dtype=bool), mine, full

        self._audit(len(texts), again, groups, references)
        return texts

    def _audit(
        self,
        requests: int,
        again: Callable[[list[int]], Twice],
        groups: Sequence[str] | None,
        references: Sequence[Any] | None,
    ) -> None:
        """Draw requests, answer them again, and write the state: also of the draws, which no restart may repeat."""
        _check_given("groups", groups, requests, self.audits.has_groups)
        _check_given("references", references, requests, bool(self.audits.metrics))
        rows = self.audits.draw(requests)
        if rows:
            same, mine, full = again(rows)
            of_rows = [] if references is None else [references[i] for i in rows]
            scores = {
                metric: (_scores(score, mine, of_rows), _scores(score, full, of_rows))
                for metric, score in self._scorers.items()
            }
            self.audits.observe(same, scores, None if groups is None else [groups[i] for i in rows])
        if self._file is not None:
            self.audits.save(self._file, self._policy)

    def _texts(self, sequences: Tensor) -> list[str]:
        return self.engine.processor.decode(sequences) if self._scorers else []


def _scores(score: Scorer, texts: Sequence[str], references: Sequence[Any]) -> np.ndarray:
    return np.array([score(text, refs) for text, refs in zip(texts, references, strict=True)], dtype=np.float64)


def _checked(scorers: Mapping[str, Scorer], metrics: Sequence[str], engine: ExitEngine) -> dict[str, Scorer]:
    """Return the scorers of the promised metrics."""
    if missing := [metric for metric in metrics if metric not in scorers]:
        raise ValueError(
            f"Watching {missing[0]!r} needs what scores an answer: `scorers={{{missing[0]!r}: ...}}`, such as "
            "`lightning_mue.metrics.scorer(...)`; `promises=Promise('consistency', keep=...)` needs no references"
        )
    if metrics and engine.processor is None:
        raise ValueError(f"Scoring {metrics[0]!r} needs text, and this engine has no processor; give it one")
    return {metric: scorers[metric] for metric in metrics}


def _check_greedy(inputs: Mapping[str, Any]) -> None:
    """Refuse what no promise is about."""
    if asked := sorted({"do_sample", "num_beams"} & set(inputs)):
        raise ValueError(f"What is promised, and watched, is greedy decoding; leave {asked} out, or use the engine.")


def _check_given(name: str, values: Sequence[Any] | None, requests: int, needed: bool) -> None:
    if (values is None and needed) or (values is not None and len(values) != requests):
        found = "none" if values is None else str(len(values))
        raise ValueError(f"`{name}` must be given for each of {requests} requests, got {found}")
