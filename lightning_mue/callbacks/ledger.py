"""The ledger: which tests certification data has been used for, so that using it again is noticed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from lightning_mue.files import write_text

Reuse = Literal["refuse", "spend"]


@dataclass(frozen=True)
class Entry:
    """One sequence of tests.

    Args:
        clusters: short hashes of what was drawn independently and certifies.
        fingerprint: of the weights.
        question: hash of all else that decides the result: the chain, the promises, how it is decoded, level and seed.
        risk: the chance of error it was given, ``1 - confidence_level``.
        after: questions of the same weights and some of the same clusters that were answered before.
        intent: hash of what the question was to be before the data was seen: all but the chain.
        beside: the intents of what was asked at the same time.
    """

    clusters: tuple[str, ...]
    fingerprint: str
    question: str
    risk: float
    after: tuple[str, ...] = ()
    intent: str = ""
    beside: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        clusters: Iterable[str],
        fingerprint: str,
        question: str,
        risk: float,
        intent: str = "",
        beside: Iterable[str] = (),
    ) -> Entry:
        """Return the entry of clusters by name and of a question and intents in full."""
        names = tuple(sorted({_digest(name) for name in clusters}))
        others = tuple(sorted(map(_digest, beside)))
        return cls(names, fingerprint, _digest(question), risk, intent=_digest(intent), beside=others)


class Ledger:
    """A file of entries, and what it held at first: tests whose results may have led to the ones to come.

    Args:
        path: of the file, made when first written to.

    Raises:
        ValueError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._before = self._read()

    def enter(self, entry: Entry, reuse: Reuse) -> list[Entry]:
        """Write an entry down, before its first test; return the earlier ones that share clusters and weights.

        Asking the same question again is no new test: it gives the same answer.

        Raises:
            ValueError: there are earlier ones, and reuse is refused, or no confidence is left.
        """
        mine = [e for e in self._before if e.fingerprint == entry.fingerprint and set(e.clusters) & set(entry.clusters)]
        again = next((e for e in mine if (e.question, e.clusters) == (entry.question, entry.clusters)), None)
        # What was asked at the same time was not chosen by any result, even where a stop came between the answers.
        earlier = [e for e in mine if (again is None or e.question in again.after) and entry.intent not in e.beside]
        if earlier and again is None and reuse == "refuse":
            raise ValueError(
                f"Some of these samples have tested {len(earlier)} other chain(s) of policies of these weights before "
                f"({self.path}). A test chosen after seeing the result of another is not covered by its confidence "
                "level. Calibrate on samples not yet used, or `--reuse spend`: the certificate then names the "
                "confidence that is left over all tests."
            )
        if sum((e.risk for e in earlier), entry.risk) >= 1:
            raise ValueError(
                f"{len(earlier)} tests on these samples have spent all confidence ({self.path}); use new samples"
            )
        if again is None:
            written = {**asdict(entry), "after": [e.question for e in earlier]}
            write_text(self.path, json.dumps([*map(asdict, self._read()), written], indent=1) + "\n")
        return earlier

    def other_weights(self, entry: Entry) -> int:
        """Return how many other models some of these samples were used for."""
        used = {e.fingerprint for e in self._before if set(e.clusters) & set(entry.clusters)}
        return len(used - {entry.fingerprint})

    def _read(self) -> list[Entry]:
        if not self.path.exists():
            return []
        try:
            entries = json.loads(self.path.read_text(encoding="utf-8"))
            return [Entry(**e | {k: tuple(e[k]) for k in ("clusters", "after", "beside")}) for e in entries]
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            raise ValueError(
                f"{self.path} must list the tests made on this data, and cannot be read ({error!r}); if you know that "
                "the certify split was not used before, delete it"
            ) from error


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
