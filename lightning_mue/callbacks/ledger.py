"""The ledger: which tests certification data has been used for, so that using it again is noticed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from lightning_mue.files import write_text

Reuse = Literal["refuse", "spend"]


@dataclass(frozen=True)
class Entry:
    """One sequence of tests.

    Args:
        samples: hash of the samples that certify.
        fingerprint: of the weights.
        question: hash of all else that decides the result: the chain, the promises, level and seed.
        risk: the chance of error it was given, ``1 - confidence_level``.
    """

    samples: str
    fingerprint: str
    question: str
    risk: float


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

    def _read(self) -> list[Entry]:
        if not self.path.exists():
            return []
        try:
            return [Entry(**entry) for entry in json.loads(self.path.read_text(encoding="utf-8"))]
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(
                f"{self.path} must list the tests made on this data, and cannot be read ({error}); if you know that "
                "the certify split was not used before, delete it"
            ) from error

    def enter(self, entry: Entry, reuse: Reuse) -> list[Entry]:
        """Write an entry down, before its first test; return the earlier ones of the same samples and weights.

        Asking the same question again is no new test: it gives the same answer.

        Raises:
            ValueError: there are earlier ones, and reuse is refused.
        """
        mine = [e for e in self._before if (e.samples, e.fingerprint) == (entry.samples, entry.fingerprint)]
        earlier = mine[: mine.index(entry)] if entry in mine else mine
        if earlier and entry not in mine and reuse == "refuse":
            raise ValueError(
                f"These samples have tested {len(earlier)} other chain(s) of policies of these weights before "
                f"({self.path}). A test chosen after seeing the result of another is not covered by its confidence "
                "level. Calibrate on samples not yet used, or set `reuse: spend`: the certificate then names the "
                "confidence that is left over all tests."
            )
        if entry not in (entries := self._read()):
            write_text(self.path, json.dumps([asdict(e) for e in [*entries, entry]], indent=1) + "\n")
        return earlier

    def other_weights(self, entry: Entry) -> int:
        """Return how many other models these samples were used for."""
        return len({e.fingerprint for e in self._before if e.samples == entry.samples} - {entry.fingerprint})
