"""Certificates: what was promised of a policy, and the tests that allow it. Pure data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lightning_mue.promise import Promise

KINDS = ("certified", "approximate", "estimate", "uncertified", "full depth", "verified")
"""``certified``: the promise holds with the confidence level over the draw of the calibration data. ``approximate``:
the same of a corpus's metric, the truer the more clusters there are. ``estimate``: what too few samples for a promise
said, with an interval. ``uncertified``: simulated only. ``full depth``: nothing passed, and the plain model keeps any
promise. ``verified``: the plain model settles every token, so nothing needs a test."""

VERIFIED = (
    "Verified: what leaves the decoder early is a draft, and the last layer settles every token. The answers are "
    "those of the full-depth model."
)


ONE_SIDE = (
    "Pictures and texts may both leave early here. A certificate is of one side that leaves early and looks among the "
    "other, embedded at full depth; of two that both left early nothing is promised."
)


@dataclass(frozen=True)
class Evidence:
    """One promise, and what speaks for it.

    Args:
        promise: what was promised.
        group: of samples that it is about; "" for all.
        n: samples.
        clusters: independent units among them.
        p_value: of "the mean loss exceeds the tolerance".
        mean_loss: over clusters.
        score: mean over clusters, of what a cap lets count; None for ``consistency``.
        score_full_depth: of full depth on the same samples.
        kept: the part of full depth's score kept, or of outputs unchanged.
        interval: of ``kept`` at the confidence level, from bootstrapped clusters; for estimates of enough clusters.
        method: of the test.
        estimated: whether ``kept`` decided, and not the test.
    """

    promise: Promise
    group: str = ""
    n: int = 0
    clusters: int = 0
    p_value: float | None = None
    mean_loss: float | None = None
    score: float | None = None
    score_full_depth: float | None = None
    kept: float | None = None
    interval: tuple[float, float] | None = None
    method: str = ""
    estimated: bool = False

    @property
    def subject(self) -> str:
        """What it is about, in words: the promise, and the group."""
        return self.promise.in_words() + (f" in group {self.group!r}" if self.group else "")


@dataclass(frozen=True)
class Certificate:
    """What was promised, and the tests that allow the promise.

    Args:
        kind: one of ``KINDS``.
        evidence: of every promise and group, at least one.
        confidence_level: of all of them together.
        seed: of the one permutation of the clusters.
        split_hash: of the samples that were decoded.
        chain_hash: of the policies that were to be tested, fixed before.
        data_fingerprint: of the data set.
        decode: decode settings; the promise holds with these.
        versions: of the libraries that computed it.
        note: what a reader must know beside it.
    """

    kind: str
    evidence: tuple[Evidence, ...]
    confidence_level: float
    seed: int = 0
    split_hash: str = ""
    chain_hash: str = ""
    data_fingerprint: str = ""
    decode: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    note: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS or not self.evidence:
            raise ValueError(f"A certificate is one of {list(KINDS)} about a promise, got {self.kind!r}")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Certificate:
        """Read what ``to_dict`` wrote."""
        evidence = tuple(
            Evidence(**entry | {"promise": Promise(**entry["promise"]), "interval": _pair(entry["interval"])})
            for entry in data["evidence"]
        )
        return cls(**{**data, "evidence": evidence})

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    def as_verified(self) -> Certificate:
        """Return what is left of it where the plain model settles every token: the decode settings."""
        evidence = tuple(Evidence(found.promise, found.group) for found in self.evidence)
        return replace(self, kind="verified", evidence=evidence, note="")

    @property
    def promise(self) -> Promise:
        """The first promise."""
        return self.evidence[0].promise

    @property
    def metric(self) -> str:
        """The metric of the first promise."""
        return self.promise.metric

    def in_words(self) -> str:
        """Return the promise in a few plain sentences."""
        return f"{_SENTENCE[self.kind](self)} {self.note}".strip()

    def explained(self) -> str:
        """Return the promise, the tests behind it, and what it does not say: a few plain paragraphs."""
        parts = [self.in_words(), *(f"* {_tested(found)}" for found in self.evidence if found.n)]
        if self.kind in ("certified", "approximate"):
            parts += [_MEANING.format(risk=1 - self.confidence_level)]
        if self.decode:
            parts.append("Decoded with: " + ", ".join(f"{k} = {v}" for k, v in sorted(self.decode.items()) if v))
        hashes = {"samples": self.split_hash, "policies to test": self.chain_hash, "data set": self.data_fingerprint}
        named = [f"{name} {value[:16]}" for name, value in hashes.items() if value]
        parts += [f"Made of: {', '.join(named)}; seed {self.seed}."] if named else []
        return "\n".join(parts)


def kind_of(evidence: Sequence[Evidence]) -> str:
    """Return the kind of certificate of a policy that passed all its tests."""
    return "approximate" if any(found.promise.approximate for found in evidence) else "certified"


_MEANING = (
    "What it means: if calibration were done again and again on fresh samples of the same source, at most {risk:.0%} "
    "of them would end with a policy that breaks the promise. It speaks of the mean over new samples, not of each one, "
    "and only of data like this, of these weights and decode settings."
)


def _pair(interval: Any) -> tuple[float, float] | None:
    return None if interval is None else (float(interval[0]), float(interval[1]))


def _certified(certificate: Certificate) -> str:
    level = f"With {certificate.confidence_level:.0%} confidence over the draw of the calibration data, this policy"
    if certificate.kind == "approximate":
        level = f"Approximately, as drawing the samples again tells it: {level[0].lower()}{level[1:]}"
    about = "on new data from the same source"
    if len(certificate.evidence) == 1:
        (found,) = certificate.evidence
        return f"{level} {found.subject} {about} ({_numbers(found)})."
    each = "; ".join(f"{found.subject} ({_numbers(found)})" for found in certificate.evidence)
    return f"{level} does all of this {about}: {each}."


def _estimate(certificate: Certificate) -> str:
    each = "; ".join(
        f"{found.promise.metric.replace('_', ' ')}{f' in group {found.group!r}' if found.group else ''}: "
        f"{found.kept:.1%} kept ({_between(found, certificate.confidence_level)}; {found.n} samples in "
        f"{found.clusters} clusters)"
        for found in certificate.evidence
        if found.kept is not None
    )
    return f"An estimate on the samples that chose this policy, no promise: {each or 'full depth scores nothing'}."


def _between(found: Evidence, level: float) -> str:
    return "no interval" if found.interval is None else "{:.1%} to {:.1%} at {:.0%}".format(*found.interval, level)


_SENTENCE = {
    "certified": _certified,
    "approximate": _certified,
    "estimate": _estimate,
    "full depth": lambda certificate: "No exit policy was certified: this is the full-depth model.",
    "verified": lambda certificate: VERIFIED,
    "uncertified": lambda certificate: (
        "Uncertified: thresholds were simulated on data that also chose the checkpoint; no promise is made."
    ),
}


def _numbers(found: Evidence) -> str:
    return f"n = {found.n} samples in {found.clusters} clusters, p = {found.p_value:.2g}, {found.method}"


def _tested(found: Evidence) -> str:
    text = f"{found.subject}: {found.n} samples in {found.clusters} clusters"
    if found.score is not None:
        text += f", {found.score:.4f} where full depth has {found.score_full_depth:.4f}"
    if found.kept is not None:
        text += f", {found.kept:.2%} kept"
    tested = found.p_value is not None and not found.estimated
    return f"{text}, p = {found.p_value:.2g} ({found.method})" if tested else text
