"""Promises: what is kept of full depth, per sample, as losses whose mean is tested."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lightning_mue.corpus import CORPUS

OF_EMBEDDINGS: dict[str, int] = {"recall_at_1": 1, "recall_at_5": 5, "recall_at_10": 10, "top_1": 1}
"""The metrics of embeddings: a query scores 1 if one of its own is among so many best of fixed candidates, else 0.
``recall_at_k``: a picture among texts, or a text among pictures, drawn from data that certifies nothing; ``top_1``: a
picture among the texts of all classes."""

RANGES: dict[str, float] = {
    "accuracy": 1.0,
    "exact_match": 1.0,
    "exact_text": 1.0,
    "vqa_accuracy": 1.0,
    "anls": 1.0,
    "character_accuracy": 1.0,
    "rouge_l": 1.0,
    "cider": 10.0,
    "bleu": 1.0,
    **dict.fromkeys(OF_EMBEDDINGS, 1.0),
}
"""The metrics, and how high they score; the lowest is 0. ``cider``: CIDEr-D by frozen frequencies, ``bleu``: BLEU-4."""

METRICS = (*RANGES, "consistency")
"""What can be promised: of a metric's mean, or identical outputs."""

UPPER = 1.0
"""The largest loss possible, whatever was promised."""


@dataclass(frozen=True)
class Promise:
    """One thing that a policy keeps, in the mean over samples of one source.

    Args:
        metric: one of ``METRICS``; ``consistency`` (the same output as full depth) needs no references.
        keep: the fraction of full depth's score to keep, or for ``consistency`` of outputs to leave unchanged.
        drop: instead of ``keep``: how much of the score may be lost, in the metric's own units.
        cap: scores above count as this much: fewer samples are then needed. The metric's highest score if not given.

    Raises:
        ValueError: it cannot be meant.
    """

    metric: str
    keep: float | None = None
    drop: float | None = None
    cap: float | None = None

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(
                f"`metric` must be one of {list(METRICS)}, got {self.metric!r}; 'consistency' (same output as full "
                "depth) needs no references"
            )
        if (self.keep is None) == (self.drop is None):
            raise ValueError(f"Promise either `keep` or `drop`, got keep={self.keep}, drop={self.drop}")
        if self.keep is not None and not 0 < self.keep < 1:
            raise ValueError(
                f"`keep` must lie in (0, 1) (the fraction of full-depth quality to keep, such as 0.98), "
                f"got {self.keep:g}"
            )
        if self.metric == "consistency" and (self.drop is not None or self.cap is not None):
            raise ValueError("Outputs are the same or not: 'consistency' takes `keep`, and no `drop` or `cap`")
        if self.cap is not None and not 0 < self.cap <= RANGES[self.metric]:
            raise ValueError(f"`cap` must lie in (0, {RANGES[self.metric]:g}] for {self.metric!r}, got {self.cap:g}")
        if self.approximate and self.cap is not None:
            raise ValueError(f"{self.metric!r} is no mean over samples: a `cap` of a sample's score has no meaning")
        if self.drop is not None and not 0 < self.drop < self.highest:
            raise ValueError(
                f"`drop` must lie in (0, {self.highest:g}), in units of {self.metric!r}, got {self.drop:g}"
            )

    @property
    def approximate(self) -> bool:
        """Whether it is about a metric of a corpus, no mean over samples: its tests are approximate."""
        return self.metric in CORPUS

    @property
    def highest(self) -> float:
        """The highest score that counts."""
        return self.cap if self.cap is not None else RANGES.get(self.metric, 1.0)

    @property
    def tolerance(self) -> float:
        """The mean loss allowed: ``1 - keep`` for consistency, 0 for a fraction of a score, ``drop`` in [0, 1]."""
        if self.drop is not None:
            return self.drop / self.highest
        assert self.keep is not None
        return 1 - self.keep if self.metric == "consistency" else 0.0

    def losses(self, scores: np.ndarray, full_scores: np.ndarray, same: np.ndarray) -> np.ndarray:
        """Return the losses of samples, float64 ``[n]``, at most 1: a mean of ``tolerance`` or less keeps the promise.

        ``consistency``: 0 where the output is full depth's, 1 elsewhere. Otherwise, with scores as parts of the
        highest, ``(keep * full - score) / keep``, for ``E[score] >= keep E[full]`` is linear in the scores: one mean
        decides and no ratio is estimated; or ``full - score``.

        Args:
            scores: of the policy, ``[n]``; not read for consistency.
            full_scores: of full depth on the same samples, ``[n]``; not read for consistency.
            same: bool ``[n]``, the output is full depth's; read for consistency alone.

        Raises:
            ValueError: scores out of the metric's range, or of other samples.
        """
        if self.metric == "consistency":
            if (same := np.asarray(same)).dtype != np.bool_:
                raise ValueError(f"`same` must be boolean (output equals the full-depth output), got {same.dtype}")
            return (~same).astype(np.float64)
        parts = self._part(scores, "scores")
        full = self._part(full_scores, "full_scores")
        if parts.shape != full.shape:
            raise ValueError(f"Scores must be of the same samples, got {parts.shape} and {full.shape} at full depth")
        return full - parts if self.keep is None else (self.keep * full - parts) / self.keep

    def loss_of_full_depth(self, full_score: float) -> float:
        """Return the mean loss of the plain model, whose capped mean score this is: no policy needs to do better."""
        if self.metric == "consistency" or self.keep is None:
            return 0.0
        return -full_score / self.highest * (1 - self.keep) / self.keep

    def least(self, full_score: float) -> float:
        """Return the least mean score that keeps the promise where full depth has ``full_score``."""
        return full_score - self.drop if self.drop is not None else (self.keep or 0.0) * full_score

    def in_words(self) -> str:
        """Return what a policy under this promise does, as a clause: ``keeps at least 98.0% of ...``."""
        if self.metric == "consistency":
            return f"gives the full-depth output on at least {self.keep:.1%} of inputs"
        name = self.metric.replace("_", " ") + (f" (capped at {self.cap:g})" if self.cap is not None else "")
        if self.keep is None:
            return f"loses at most {self.drop:g} of the full-depth {name}"
        return f"keeps at least {self.keep:.1%} of the full-depth {name}"

    def _part(self, scores: np.ndarray, name: str) -> np.ndarray:
        """Return scores as parts of the highest that counts."""
        scores = np.asarray(scores, np.float64)
        if not ((scores >= 0) & (scores <= RANGES[self.metric] * (1 + 1e-9))).all():  # also refuses NaN
            raise ValueError(
                f"`{name}` of {self.metric!r} must lie in [0, {RANGES[self.metric]:g}], got "
                f"[{scores.min():g}, {scores.max():g}]"
            )
        return np.minimum(scores, self.highest) / self.highest
