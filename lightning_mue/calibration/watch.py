"""The drift watch: an alarm, valid at any time, that a promise no longer holds; fed with requests answered twice.

The null hypothesis is that of certification, reversed: the promise holds. One bets against it, loss by loss; wealth
that a kept promise makes unlikely is the alarm (Waudby-Smith and Ramdas 2024; for a start that is not known, Shekhar
and Ramdas 2023).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from lightning_mue.certificate import Certificate
from lightning_mue.promise import Promise

BETS = 0.5 ** np.arange(1, 11)
"""The bets, as fractions of the bet that a single loss at the lower bound would ruin: the bold notice a breakdown in a
few audits, the small ones a few losses in a thousand more than allowed."""


@dataclass(eq=False)
class Watch:
    """Watches one promise in service; audits may go on for ever, memory is constant.

    As long as the promise holds, the chance that the alarm is ever raised is at most ``1 - confidence_level``, however
    often one looks and however long: there is no false alarm every so many months. It holds if the expected loss of
    every audited request, given those before, is within the tolerance. So a spell of harder requests is a drift too
    while it lasts; full depth failing as often as the policy is none. Requests count one by one, clusters or not.

    A promise that breaks after ``t`` audits is noticed later than one that never held, by about ``log t`` of evidence.
    (One bet since the first audit would first have to win back what it lost while all was well.)

    Args:
        promise: what is watched.
        confidence_level: of an alarm, in (0, 1).
        group: of requests that the promise is about; "" for all.
        audits: requests seen.
        total_loss: their losses, summed.
        log_wealth: ``[bets]``, log of each bet's wealth, the stake for the next audit in it.
        log_peak: log of the most evidence there ever was.

    Raises:
        ValueError: a level out of range, or a state that is none.
    """

    promise: Promise
    confidence_level: float = 0.95
    group: str = ""
    audits: int = 0
    total_loss: float = 0.0
    log_wealth: np.ndarray = field(default_factory=lambda: np.full(len(BETS), log_stake(1)))
    log_peak: float = 0.0

    def __post_init__(self) -> None:
        _check_level(self.confidence_level)
        if self.promise.approximate:
            raise ValueError(
                f"{self.promise.metric!r} is of a corpus, and no single request can break that promise; watch a metric "
                "of samples, such as 'rouge_l', or 'consistency'"
            )
        self.log_wealth = np.asarray(self.log_wealth, np.float64)
        if self.log_wealth.shape != BETS.shape or not np.isfinite(self.log_wealth).all():
            raise ValueError(f"`log_wealth` must be {len(BETS)} finite numbers, got {self.log_wealth.tolist()}")

    @property
    def subject(self) -> tuple[Promise, str, float]:
        """What is watched, at which level."""
        return self.promise, self.group, self.confidence_level

    @property
    def p_value(self) -> float:
        """Of "the promise holds", valid whenever one looks; it never rises again."""
        return math.exp(-self.log_peak)

    @property
    def alarm(self) -> bool:
        """Whether the promise was found broken; it stays so."""
        return self.p_value <= 1 - self.confidence_level

    @property
    def mean_loss(self) -> float:
        """Of all audits; NaN before the first."""
        return self.total_loss / self.audits if self.audits else math.nan

    def observe(self, scores: np.ndarray, full_scores: np.ndarray, same: np.ndarray) -> bool:
        """Take in audits of ``n`` requests, as ``Promise.losses`` reads them, and return whether there is alarm.

        Which requests are audited must not depend on their answers.
        """
        tolerance, lower = self.promise.tolerance, lowest_loss(self.promise)
        for loss in self.promise.losses(scores, full_scores, same).tolist():
            self.audits += 1
            self.total_loss += loss
            self.log_wealth = after_audit(self.log_wealth, loss, tolerance, lower, self.audits)
            self.log_peak = max(self.log_peak, log_evidence(self.log_wealth, self.audits))
        return self.alarm

    def in_words(self) -> str:
        """Return what was found as a sentence."""
        about = f"that this policy {self.promise.in_words()}" + (f" in group {self.group!r}" if self.group else "")
        if not self.audits:
            return f"Nothing was audited yet to tell {about}."
        verdict = "ALARM: it no longer holds" if self.alarm else "No alarm: nothing refutes"
        return (
            f"{verdict} {about} ({self.audits} audits, mean loss {self.mean_loss:.4f}, allowed "
            f"{self.promise.tolerance:.4f}; p = {self.p_value:.2g}, alarm at {1 - self.confidence_level:.2g})."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return promise and state as plain JSON values."""
        return asdict(self) | {"log_wealth": self.log_wealth.tolist()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Watch:
        """Read what ``to_dict`` wrote; it goes on exactly where it was."""
        return cls(**{**data, "promise": Promise(**data["promise"])})


def promised(certificate: Certificate | None) -> list[tuple[Promise, str]]:
    """Return what is certified: each promise with its group.

    Raises:
        ValueError: nothing is.
    """
    if certificate is None or certificate.kind not in ("certified", "approximate"):
        found = "the policy has no certificate" if certificate is None else certificate.in_words()
        raise ValueError(f"Nothing is promised, so there is nothing to watch ({found}); calibrate, or give `promises`")
    return [(found.promise, found.group) for found in certificate.evidence]


def watch_all(subjects: Sequence[tuple[Promise, str]], confidence_level: float) -> list[Watch]:
    """Return a watch of each promise and group, with this much confidence in an alarm of any of them."""
    _check_level(confidence_level)
    return [Watch(promise, 1 - (1 - confidence_level) / len(subjects), group) for promise, group in subjects]


def lowest_loss(promise: Promise) -> float:
    """Return the smallest loss possible: full depth scores nothing, the policy all there is."""
    return float(promise.losses(np.array([promise.highest]), np.zeros(1), np.ones(1, dtype=bool))[0])


def after_audit(log_wealth: np.ndarray, loss: float, tolerance: float, lower: float, audits: int) -> np.ndarray:
    """Return each bet's log wealth after audit number ``audits``, with the stake for the next one in it.

    A factor ``1 + bet (loss - tolerance)`` has mean 1 or less under the null, whatever was seen before, and stays
    positive, since every bet is below ``1 / (tolerance - lower)``.
    """
    gain = np.log1p(BETS / (tolerance - lower) * (loss - tolerance))
    return np.logaddexp(log_wealth + gain, log_stake(audits + 1))


def log_evidence(log_wealth: np.ndarray, audits: int) -> float:
    """Return log of the mean wealth, with what is not staked yet; at most 1 in the mean under the null, and 1 at first.

    By Ville's inequality ``P(it ever reaches 1 / delta) <= delta``.
    """
    return float(np.logaddexp(np.logaddexp.reduce(log_wealth) - math.log(len(log_wealth)), _log_kept(audits + 1)))


def log_stake(audit: int) -> float:
    """Return log of the part of a wealth of 1 that is bet from audit number ``audit`` (from 1) on.

    ``1 / (1 + log t)`` is kept back for what follows audit ``t``: all stakes sum to 1 and fall little faster than
    ``1 / t``, for a promise may break at any time.
    """
    return math.log(math.log1p(1 / audit)) + _log_kept(audit - 1) + _log_kept(audit)


def _log_kept(audits: int) -> float:
    return -math.log1p(math.log1p(audits))


def _check_level(confidence_level: float) -> None:
    if not 0 < confidence_level < 1:
        raise ValueError(f"`confidence_level` must lie in (0, 1), such as 0.95, got {confidence_level:g}")
