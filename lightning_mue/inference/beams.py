"""Beam search over one sample: which beams go on, which hypotheses are kept, and when no better one can come.

The rules are those of transformers' ``generate`` with several beams and no sampling. No torch here.
Shapes: ``K`` beams, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

_NEVER = np.float32(-1e9)
"""Score of a beam that does not exist yet."""


@dataclass(frozen=True)
class BeamSettings:
    """How beams are searched; names and meaning as in transformers' generation config.

    Args:
        num_beams: beams of a sample.
        length_penalty: hypotheses are compared by the sum of their log probabilities over ``length ** length_penalty``.
        early_stopping: stop when there are ``num_beams`` hypotheses (True), when none better is likely (False), or when
            none better is possible (``"never"``).

    Raises:
        ValueError: fewer than two beams, or another word for ``early_stopping``.
    """

    num_beams: int
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        if self.num_beams < 2:
            raise ValueError(f"`num_beams` must be at least 2 (1 is greedy decoding), got {self.num_beams}")
        if self.early_stopping not in (True, False, "never"):
            raise ValueError(f"`early_stopping` must be True, False or 'never', got {self.early_stopping!r}")


def beam_settings(
    num_beams: int, length_penalty: float, early_stopping: bool | Literal["never"]
) -> BeamSettings | None:
    """Return how beams are searched, or None where one beam is asked for."""
    return None if num_beams == 1 else BeamSettings(num_beams, length_penalty, early_stopping)


@dataclass
class Hypothesis:
    """An answer, or the beginning of one.

    Args:
        score: of a beam the sum of log probabilities; of a finished one, after the length penalty.
        tokens: chosen so far.
        depths: exit depth of each.
    """

    score: float
    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)


class BeamSearch:
    """The search for the answer to one sample.

    Args:
        settings: how.
        end_ids: a token that ends a hypothesis.
        steps: tokens of a hypothesis at most.

    Attributes:
        running: the beams; equal at first, of which only the first counts.
        finished: the best hypotheses, the best of all first.
        done: no better one is to come.
    """

    def __init__(self, settings: BeamSettings, end_ids: Sequence[int], steps: int) -> None:
        self._settings, self._end_ids, self._steps = settings, end_ids, steps
        self.running = [Hypothesis(float(_NEVER if beam else 0)) for beam in range(settings.num_beams)]
        self.finished: list[Hypothesis] = []
        self.done = False

    def advance(self, log_probs_KV: np.ndarray, depths_K: Sequence[int]) -> list[int]:
        """Give every beam its next token; return which beam each of the new ones goes on from.

        Args:
            log_probs_KV: float32, of the next token of each beam, processed.
            depths_K: at which layer it was chosen.
        """
        beams, settings = len(self.running), self._settings
        total = (log_probs_KV + np.array([[beam.score] for beam in self.running], np.float32)).ravel()
        best = _largest(total, max(2, 1 + len(self._end_ids)) * beams)
        parents, tokens = np.divmod(best, log_probs_KV.shape[1])
        length, going = len(self.running[0].tokens) + 1, list[tuple[int, Hypothesis]]()
        for rank, (parent, token, score) in enumerate(
            zip(parents.tolist(), tokens.tolist(), total[best].tolist(), strict=True)
        ):
            before = self.running[parent]
            grown = Hypothesis(score, [*before.tokens, token], [*before.depths, depths_K[parent]])
            if token not in self._end_ids and length < self._steps:
                going.append((parent, grown))
            elif rank < beams and score > _NEVER / 2:
                grown.score /= length**settings.length_penalty
                self.finished.append(grown)
        if not going and not self.finished:  # nothing was allowed in the end
            self.finished = [self.running[parents[0]]]
        self.finished = sorted(self.finished, key=lambda found: -found.score)[:beams]
        self.running = [grown for _, grown in going[:beams]]
        self.done = not going or self._is_settled(length)
        return [parent for parent, _ in going[:beams]]

    def _is_settled(self, length: int) -> bool:
        if len(self.finished) < len(self.running):
            return False
        if self._settings.early_stopping is True:
            return True
        penalty, longest = self._settings.length_penalty, self._settings.early_stopping == "never"
        reached = self._steps if longest and penalty > 0 else length
        return self.running[0].score / reached**penalty <= self.finished[-1].score


def _largest(x: np.ndarray, count: int) -> np.ndarray:
    """Return where the largest numbers are, the largest first, of equals the first."""
    count = min(count, len(x))
    reach = np.partition(x, len(x) - count)[len(x) - count]
    at = np.flatnonzero(x >= reach)
    return at[np.argsort(-x[at], kind="stable")][:count]
