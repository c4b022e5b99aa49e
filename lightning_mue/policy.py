"""Exit policies: which stream may be left after which layers, at which score.

Pure data, JSON both ways. A policy knows nothing of tensors or models; the engine obeys it, the calibrator writes it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_mue.certificate import Certificate
from lightning_mue.files import write_text

SCHEMA, VERIFIED_SCHEMA = 2, 3
"""Versions before verified mode would serve its drafts as answers."""

SIGNAL_RANGES: dict[str, tuple[float, float]] = {
    "similarity": (-1.0, 1.0),
    "confidence": (0.0, 1.0),
    "margin": (0.0, 1.0),
    "entropy": (0.0, 1.0),
    "gate": (0.0, 1.0),
    "static": (0.0, 1.0),
    "patience": (1.0, math.inf),
    "flat_similarity": (-1.0, 1.0),
    "pooled_similarity": (-1.0, 1.0),
    "class_margin": (0.0, 1.0),
}
"""Every signal and the range of its scores; higher = safer. ``static`` always scores 1: it makes a fixed depth.
``patience`` counts the exits in a row that agree; ``flat_similarity`` judges a whole batch at once (MuE's code)."""

OF_EMBEDDINGS = frozenset({"pooled_similarity", "class_margin"})
"""Signals of the embedding that leaving there would give: the cosine to that of the layer before, and by how much the
most probable class leads the second. Only streams whose states become embeddings have them."""

KV_FILLS = ("just-in-time", "propagate", "copy")
"""How positions get K/V in layers they had left before: computed (DEED, exact); their last state is passed up and
projected by each layer's own weights (CALM); or the projected K/V are copied up (what MuE's code
means to do; as released it leaves holes)."""


PRECISIONS = (None, "bfloat16", "float16", "int8", "int8_rows")
"""``int8_rows``: a row's answer does not depend, to the last bit, on the rows beside it; ``int8`` is faster."""


@dataclass(frozen=True)
class ExitRule:
    """Leave a stream after ``layers[i]`` (counted from 1) if the signal's score is at least ``thresholds[i]``.

    A threshold lies in the signal's range, or is ``inf``: that exit is never taken. Layers not named are never exits.

    Args:
        signal: what scores.
        layers: exit layers, rising.
        thresholds: one for each.
        decay: decoder only, ``(beta, tau)``: at step ``t`` of at most ``N`` the threshold is
            ``beta * threshold + (1 - beta) * exp(-tau * t / N)``, so that early tokens, on which others build, leave
            later (CALM, equation 5; MuE, section 3.2).
        from_step: decoder only: no exit before this step (MuE's code protects the first third).
    """

    signal: str
    layers: tuple[int, ...]
    thresholds: tuple[float, ...]
    decay: tuple[float, float] | None = None
    from_step: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(int(k) for k in self.layers))
        object.__setattr__(self, "thresholds", tuple(float(t) for t in self.thresholds))
        if self.decay is not None:
            object.__setattr__(self, "decay", tuple(float(number) for number in self.decay))
            if len(self.decay) != 2 or not (0 <= self.decay[0] <= 1 and 0 <= self.decay[1] < math.inf):
                raise ValueError(f"`decay` must be (beta in [0, 1], tau >= 0), got {self.decay}")
        if self.from_step < 0:
            raise ValueError(f"`from_step` must be 0 or more, got {self.from_step}")
        if self.signal not in SIGNAL_RANGES:
            raise ValueError(f"`signal` must be one of {sorted(SIGNAL_RANGES)}, got {self.signal!r}")
        if len(self.layers) != len(self.thresholds) or not self.layers:
            raise ValueError(
                f"`layers` and `thresholds` must be of equal, non-zero length, "
                f"got {len(self.layers)} and {len(self.thresholds)}"
            )
        if list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 1:
            raise ValueError(f"`layers` must rise and start at 1 or above, got {list(self.layers)}")

    @classmethod
    def static(cls, depth: int) -> ExitRule:
        """Return the rule that always leaves after layer ``depth``."""
        return cls("static", (depth,), (0.0,))

    @property
    def reachable(self) -> dict[int, float]:
        """Exit layer -> threshold, exits that are never taken left out."""
        return {k: t for k, t in zip(self.layers, self.thresholds, strict=True) if t < math.inf}

    def thresholds_at(self, step: int, steps: int) -> dict[int, float]:
        """Return exit layer -> threshold at decoding step ``step`` (from 0) of at most ``steps``."""
        if step < self.from_step:
            return {}
        if self.decay is None:
            return self.reachable
        beta, tau = self.decay
        rise = (1 - beta) * math.exp(-tau * step / steps)
        return {k: beta * t + rise for k, t in self.reachable.items()}


@dataclass(frozen=True)
class ExitPolicy:
    """Exit rules by stream name; a stream without a rule runs at full depth.

    Args:
        rules: stream name -> rule.
        kv_fill: how deeper K/V of earlier tokens come to be; ``just-in-time`` is exact (DEED). The others are cheaper
            approximations.
        backlog: with them, so many of the latest positions are still computed exactly; only those further back are
            filled.
        precision: what the model computes in, such as ``bfloat16``; None: as it is.
        verified: what leaves the decoder early is a draft that the last layer settles, so the tokens are those of full
            depth; no other stream has a rule.
        groups: only samples of these groups may leave early, all others run at full depth; None: there are no groups.
        fingerprint: of the weights the thresholds belong to; the engine refuses others. None: any weights.
        certificate: None means uncalibrated.
        classes: texts of the classes that pictures are told apart by, in full; ``class_margin`` reads them.
    """

    rules: Mapping[str, ExitRule] = field(default_factory=dict)
    kv_fill: str = "just-in-time"
    backlog: int = 0
    precision: str | None = None
    groups: tuple[str, ...] | None = None
    fingerprint: str | None = None
    certificate: Certificate | None = None
    verified: bool = False
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", dict(sorted(self.rules.items())))
        object.__setattr__(self, "classes", tuple(self.classes))
        if self.kv_fill not in KV_FILLS:
            raise ValueError(f"`kv_fill` must be one of {list(KV_FILLS)}, got {self.kv_fill!r}")
        if self.backlog < 0 or (self.backlog and self.kv_fill == "just-in-time"):
            raise ValueError(
                f"`backlog` bounds what is computed before K/V are filled by 'propagate' or 'copy', got {self.backlog} "
                f"with {self.kv_fill!r}"
            )
        if self.precision not in PRECISIONS:
            raise ValueError(f"`precision` must be one of {list(PRECISIONS)}, got {self.precision!r}")
        if self.verified and ([*self.rules] != ["decoder"] or self.kv_fill != "just-in-time"):
            raise ValueError(
                "`verified` settles what leaves the decoder: it needs a rule for 'decoder', no others, and "
                f"K/V 'just-in-time'; got rules for {[*self.rules]} and {self.kv_fill!r}"
            )
        if len(set(self.classes)) != len(self.classes) or (self.asks_classes and len(self.classes) < 2):
            raise ValueError(
                f"`classes` must be distinct texts, and 'class_margin' needs two or more; got {list(self.classes)}"
            )
        for stream, rule in self.rules.items():
            if stream != "decoder" and (rule.decay is not None or rule.from_step):
                raise ValueError(f"`decay` and `from_step` count decoding steps; {stream!r} is left once per sample")
            low, high = SIGNAL_RANGES[rule.signal]
            for threshold in rule.thresholds:
                if not (low <= threshold <= high or threshold == math.inf):
                    raise ValueError(
                        f"`thresholds[{stream!r}]` must lie in [{low:g}, {high:g}] for signal {rule.signal!r} "
                        f"(or be inf: never leave there), got {threshold:g}"
                    )

    @classmethod
    def full_depth(cls) -> ExitPolicy:
        """Return the policy that never leaves early: the plain model."""
        return cls()

    def as_drafts(self) -> ExitPolicy:
        """Return the policy that drafts with the decoder's rule and loses nothing; it decodes as was certified.

        Raises:
            ValueError: there is no rule for the decoder.
        """
        if "decoder" not in self.rules:
            raise ValueError(f"Drafts need a rule for the decoder, this policy has {[*self.rules]}; calibrate one")
        return ExitPolicy(
            {"decoder": self.rules["decoder"]},
            fingerprint=self.fingerprint,
            certificate=self.certificate and self.certificate.as_verified(),
            verified=True,
        )

    @property
    def runtime(self) -> str:
        """What it was calibrated for: ``torch`` if nothing says otherwise; 8 bits need ONNX Runtime."""
        calibrated = self.certificate.decode.get("runtime") if self.certificate is not None else None
        return calibrated or ("onnxruntime" if (self.precision or "").startswith("int8") else "torch")

    @property
    def asks_classes(self) -> bool:
        """Whether a signal reads the classes."""
        return any(rule.signal == "class_margin" for rule in self.rules.values())

    @property
    def is_full_depth(self) -> bool:
        """Whether it is the plain model: no stream can be left early, and nothing is rounded."""
        return not self.rules and self.precision is None

    def depths_in_words(self) -> str:
        """Return a short name, such as ``decoder: gate at 1, 2; vision: static 2``."""
        if self.is_full_depth:
            return "full depth"
        parts = [] if self.rules else ["full depth"]
        for stream, rule in self.rules.items():
            layers = ", ".join(str(k) for k in rule.reachable)
            parts.append(
                f"{stream}: {rule.signal} at {layers}" if rule.signal != "static" else f"{stream}: static {layers}"
            )
        if self.kv_fill != "just-in-time":
            parts.append(f"K/V: {self.kv_fill}" + (f" beyond {self.backlog}" if self.backlog else ""))
        if self.verified:
            parts.append("drafts, settled by the last layer")
        return "; ".join(parts) + (f"; in {self.precision}" if self.precision is not None else "")

    def to_json(self) -> str:
        """Return the policy as canonical JSON (sorted keys; ``inf`` as null): equal policies give equal bytes."""
        rules: dict[str, dict[str, Any]] = {
            name: {
                "signal": r.signal,
                "layers": list(r.layers),
                "thresholds": [None if t == math.inf else t for t in r.thresholds],
                "decay": list(r.decay) if r.decay is not None else None,
                "from_step": r.from_step,
            }
            for name, r in self.rules.items()
        }
        data = {
            "schema": VERIFIED_SCHEMA if self.verified else SCHEMA,
            "rules": rules,
            "kv_fill": self.kv_fill,
            "backlog": self.backlog,
            "precision": self.precision,
            "groups": list(self.groups) if self.groups is not None else None,
            "fingerprint": self.fingerprint,
            "certificate": self.certificate.to_dict() if self.certificate else None,
        }
        if self.classes:  # policies without are the same bytes as before there were any
            data["classes"] = list(self.classes)
        return json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "policy") -> ExitPolicy:
        """Read a policy; ``source`` names it in errors.

        Raises:
            ValueError: not JSON, another schema, or a threshold out of its signal's range.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{source} is not JSON: {error}") from error
        if not isinstance(data, dict) or data.get("schema") not in (SCHEMA, VERIFIED_SCHEMA):
            found = data.get("schema") if isinstance(data, dict) else type(data).__name__
            raise ValueError(f"{source} must be a policy of schema {SCHEMA}, found {found!r}")
        try:
            rules = {
                name: ExitRule(
                    r["signal"],
                    tuple(r["layers"]),
                    tuple(math.inf if t is None else t for t in r["thresholds"]),
                    tuple(r["decay"]) if r.get("decay") is not None else None,
                    r.get("from_step", 0),
                )
                for name, r in data["rules"].items()
            }
            certificate = Certificate.from_dict(data["certificate"]) if data.get("certificate") else None
            groups = tuple(data["groups"]) if data.get("groups") is not None else None
            how = (data["kv_fill"], data.get("backlog", 0), data.get("precision"), groups)
            verified, classes = data["schema"] == VERIFIED_SCHEMA, tuple(data.get("classes", ()))
            return cls(rules, *how, data["fingerprint"], certificate, verified, classes)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{source} must be a policy; an entry is missing or of another kind: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the policy as JSON, aside and renamed, so that no half-written file is ever seen."""
        write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ExitPolicy:
        """Read a policy from a JSON file."""
        return cls.from_json(Path(path).read_text(encoding="utf-8"), source=str(path))


def chain_hash(policies: list[ExitPolicy]) -> str:
    """Return the hash of an ordered chain of policies, stored before the first of them is tested."""
    return hashlib.sha256("".join(p.to_json() for p in policies).encode()).hexdigest()[:16]
