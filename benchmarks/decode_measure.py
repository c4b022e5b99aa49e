"""Timing the lines of the decoders' cost table (``decode.py``) in turn."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from decode_case import Case
from decode_lines import BASELINE, Answer, Line, Unavailable, check


@dataclass(frozen=True)
class Measured:
    """A line's times.

    Args:
        answer: what it decoded.
        ms: of whole decodes, ``[repeats]``.
        parts: of our decodes -> milliseconds, ``[repeats]``.
        full: name of the line that does the same at full depth, or None.
    """

    answer: Answer
    ms: np.ndarray
    parts: Mapping[str, np.ndarray]
    full: str | None = None


def measure(
    case: Case, lines: Mapping[str, Line], repeats: int, on_done: Callable[[], None] = lambda: None
) -> dict[str, Measured]:
    """Check every line, which warms it up, then time all of them in turn; the case says which it had to leave out.

    Raises:
        ValueError: a line decodes something else.
    """
    runs: dict[str, Callable[[], Answer]] = {}
    with torch.inference_mode():
        for name, line in lines.items():
            try:
                runs[name] = line.prepare(case)
            except Unavailable as error:
                case.notes[name] = f"left out: {error}"
                for _ in range(1 + repeats):
                    on_done()
        answers: dict[str, list[Answer]] = {}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for name, run in runs.items():
            answers[name] = [run()]
            check(case, name, lines[name], answers[name][0], answers[BASELINE][0])
            on_done()
        for name in turns(list(runs), repeats, case.seed):
            begin = case.clock()
            answer = runs[name]()
            seconds[name].append(case.clock() - begin)
            answers[name].append(answer)
            on_done()
    return {name: _measured(answers[name], seconds[name], lines[name].full) for name in runs}


def turns(names: list[str], repeats: int, seed: int) -> Iterator[str]:
    """Yield all names once a round, in a new order each, and the garbage of the last one collected."""
    rng = np.random.default_rng(seed)
    gc.freeze()  # what was there before is nobody's garbage, and looking through it takes longest
    try:
        for _ in range(repeats):
            for i in rng.permutation(len(names)):
                gc.collect()
                yield names[i]
    finally:
        gc.unfreeze()


def _measured(answers: Sequence[Answer], seconds: Sequence[float], full: str | None) -> Measured:
    first, *timed = answers
    parts = {part: np.array([answer.parts[part] for answer in timed]) for part in first.parts}
    return Measured(first, np.array(seconds) * 1e3, parts, full)
