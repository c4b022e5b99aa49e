"""Audits: which requests are answered twice, what they say of every promise, and the file that outlives a restart."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lightning_mue.calibration.watch import Watch
from lightning_mue.files import write_text

SCHEMA = 1


class Audits:
    """Draws requests at random, whatever their answers, and shows what was found to the watches.

    Args:
        watches: of every promise and group, at least one.
        share: of requests to draw, in (0, 1].
        seed: of the draws.

    Raises:
        ValueError: no share, or nothing to watch.
    """

    def __init__(self, watches: Sequence[Watch], share: float, seed: int = 0) -> None:
        if not watches:
            raise ValueError("There is nothing to watch; name at least one promise")
        if not 0 < share <= 1:
            raise ValueError(f"`share` must lie in (0, 1] (of requests to answer twice, such as 0.02), got {share:g}")
        self.watches, self.share = list(watches), share
        self._random = np.random.default_rng(seed)

    @property
    def metrics(self) -> list[str]:
        """The metrics that must be scored: all but ``consistency``."""
        return sorted({watch.promise.metric for watch in self.watches} - {"consistency"})

    @property
    def has_groups(self) -> bool:
        """Whether a promise is about a group alone."""
        return any(watch.group for watch in self.watches)

    @property
    def alarm(self) -> bool:
        """Whether any promise was found broken; it stays so."""
        return any(watch.alarm for watch in self.watches)

    def in_words(self) -> str:
        """Return what was found, a sentence for each promise and group."""
        return "\n".join(watch.in_words() for watch in self.watches)

    def draw(self, requests: int) -> list[int]:
        """Return which of so many requests to audit, rising."""
        return np.flatnonzero(self._random.random(requests) < self.share).tolist()

    def observe(
        self,
        same: np.ndarray,
        scores: Mapping[str, tuple[np.ndarray, np.ndarray]],
        groups: Sequence[str] | None = None,
    ) -> None:
        """Take in ``n`` audits.

        Args:
            same: bool ``[n]``, the output is full depth's.
            scores: each of ``metrics`` -> scores of the policy and of full depth, both ``[n]``.
            groups: of each audit, if ``has_groups``.
        """
        unread = np.zeros(len(same))
        for watch in self.watches:
            metric = watch.promise.metric
            mine, full = scores[metric] if metric != "consistency" else (unread, unread)
            about = np.array([watch.group in ("", group) for group in groups or [""] * len(same)], dtype=bool)
            watch.observe(mine[about], full[about], same[about])

    def save(self, path: str | os.PathLike[str], policy: str) -> None:
        """Write the state as JSON, aside and renamed; ``policy`` is a hash of what is watched."""
        data = {
            "schema": SCHEMA,
            "policy": policy,
            "random": self._random.bit_generator.state,
            "watches": [watch.to_dict() for watch in self.watches],
        }
        write_text(path, json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n")

    def restore(self, path: str | os.PathLike[str], policy: str) -> None:
        """Go on exactly where the file was written.

        Raises:
            ValueError: it holds no state, or that of another policy, other promises or another level.
        """
        text = Path(path).read_text(encoding="utf-8")
        try:
            data = json.loads(text)
            if data["schema"] != SCHEMA:
                raise ValueError(f"its schema is {data['schema']!r}, not {SCHEMA}")
            found = [Watch.from_dict(entry) for entry in data["watches"]]
            random = np.random.default_rng()
            random.bit_generator.state = data["random"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} must be the state of a watch: {error}. Remove it to begin anew.") from error
        if data["policy"] != policy or [w.subject for w in found] != [w.subject for w in self.watches]:
            raise ValueError(
                f"{path} watches another policy, other promises or at another level; name another file, or remove it "
                "to begin anew."
            )
        self.watches, self._random = found, random
