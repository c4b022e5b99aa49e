"""The methods compared: each one a family of policies, obeyed by the same engine.

What a method's own code does beside its exits (MuE's vocabulary projection after every layer, FREE's distillation) is
not charged to it and not given to it: one model, one engine, one decoding, so that only the rule differs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from lightning_mue.policy import ExitPolicy, ExitRule

Layers = Mapping[str, Sequence[int]]
"""Stream name -> exit layers."""

PROBABILITY = (0.999, 0.995, 0.99, 0.97, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0)
COSINE = (0.999, 0.998, 0.995, 0.99, 0.98, 0.97, 0.95, 0.9, 0.85, 0.8, 0.7, 0.5, 0.3, 0.0, -1.0)
"""The dial of a stream, from hardly ever to always; the thresholds of its exits move together."""
MUE_DECAY = (0.95, 1.0)
"""MuE, appendix A: beta and tau of the caption model."""
MUE_CODE_DECAY = (0.9, 1.0)
"""MuE's published code: beta and tau."""
CALM_DECAY = (0.9, 4.0)
"""CALM, equation 5: beta is the paper's, tau ours."""
STATIC = "static decoder depth"


@dataclass(frozen=True)
class Family:
    """A method at all its settings: every stream that it leaves has a dial of its own.

    Args:
        rules: stream name -> rules from safe to bold, as many for every stream; dial ``k`` is the ``k``-th of them, and
            at dial 0 the stream stays at full depth.
        kv_fill: of all its policies.
        backlog: of all its policies.
    """

    rules: Mapping[str, Sequence[ExitRule]]
    kv_fill: str = "just-in-time"
    backlog: int = 0

    def __post_init__(self) -> None:
        if (
            len(sizes := {stream: len(rules) for stream, rules in self.rules.items()}) == 0
            or len(set(sizes.values())) > 1
        ):
            raise ValueError(f"A family needs streams with as many rules each, got {sizes}")

    @property
    def size(self) -> int:
        """The boldest dial."""
        return len(next(iter(self.rules.values())))

    def policy(self, dials: Mapping[str, int] | int) -> ExitPolicy:
        """Return the policy at some dials: stream name -> dial, or the same for all."""
        at = dict.fromkeys(self.rules, dials) if isinstance(dials, int) else dials
        rules = {stream: self.rules[stream][k - 1] for stream, k in at.items() if k}
        return ExitPolicy(rules, self.kv_fill, self.backlog) if rules else ExitPolicy.full_depth()


def families(layers: Layers, num_layers: Mapping[str, int], steps: int, gates: bool = True) -> dict[str, Family]:
    """Return the methods by name.

    Args:
        layers: exits of the model.
        num_layers: stream name -> layers at full depth.
        steps: tokens at most (MuE's code protects the first third).
        gates: whether the exits have gates.

    Raises:
        ValueError: the decoder has no exits; all of these methods leave it.
    """
    if not layers.get("decoder"):
        raise ValueError(f"The methods compared leave the decoder, and there are exits in {sorted(layers)} only.")
    decoder, last = tuple(layers["decoder"]), num_layers["decoder"]
    encoders = {stream: tuple(ks) for stream, ks in layers.items() if stream in ("encoder", "image", "text")}
    similar = {stream: _rules("similarity", ks, COSINE) for stream, ks in encoders.items()}
    flat = {stream: _rules("flat_similarity", ks, COSINE) for stream, ks in encoders.items()}
    after_a_third = (MUE_CODE_DECAY, -(-steps // 3))
    patience = [ExitRule("patience", decoder, (float(k),) * len(decoder)) for k in range(len(decoder), 1, -1)]
    found = {
        STATIC: Family({"decoder": [ExitRule.static(k) for k in sorted(decoder, reverse=True)]}),
        "MuE": Family({"decoder": _rules("similarity", decoder, COSINE, MUE_DECAY)} | similar),
        "mue-as-published": Family(
            {"decoder": _rules("flat_similarity", decoder, COSINE, *after_a_third)} | flat, kv_fill="copy"
        ),
        "DEED": Family({"decoder": _rules("confidence", decoder)}),
        "MuE encoder + DEED decoder": Family({"decoder": _rules("confidence", decoder)} | similar),
        "CALM": Family({"decoder": _rules("margin", decoder, PROBABILITY, CALM_DECAY)}, kv_fill="propagate"),
        "FREE": Family({"decoder": _rules("confidence", (_shallow(decoder, last),))}),
        "patience": Family({"decoder": patience}),
        "entropy": Family({"decoder": _rules("entropy", decoder)}),
        "gate (ours)": Family({"decoder": _rules("gate", decoder) if gates else []}),
    }
    if not encoders:
        del found["MuE encoder + DEED decoder"]  # it would be DEED once more
    return {method: family for method, family in found.items() if family.size}


def kv_modes(decoder: Sequence[int], signal: str) -> dict[str, Family]:
    """Return K/V mode -> the same rules under it."""
    rules = {"decoder": _rules(signal, tuple(decoder))}
    return {
        "just-in-time": Family(rules),
        "propagate": Family(rules, "propagate"),
        "propagate beyond 2": Family(rules, "propagate", 2),
        "propagate beyond 6": Family(rules, "propagate", 6),
        "copy": Family(rules, "copy"),
    }


def boldest(family: Family, quality_of: Callable[[ExitPolicy], float], least: float) -> ExitPolicy:
    """Return the boldest policy of a method whose quality is at least ``least``; full depth if none is.

    All dials go up together first; then each goes on alone, the decoder's before the others'. What is found keeps
    ``least``, and no dial can go one further without breaking it, where quality falls along every dial. The same rule
    for every method, static depths included.

    Args:
        family: the method.
        quality_of: decodes for real, on other data than that on which the methods are then compared.
        least: quality to keep.
    """

    def keeps(dials: Mapping[str, int]) -> bool:
        return quality_of(family.policy(dials)) >= least

    together = last_good(family.size, lambda k: keeps(dict.fromkeys(family.rules, k)))
    dials = dict.fromkeys(family.rules, together)
    if len(dials) > 1:
        for stream in sorted(dials, key=lambda name: (name != "decoder", name)):
            dials[stream] += last_good(family.size - together, partial(_further, keeps, dials, stream))
    return family.policy(dials)


def last_good(count: int, good: Callable[[int], bool]) -> int:
    """Return by bisection the greatest of 0 to ``count`` that is good, if what follows a bad one is bad; 0 is good."""
    low, high = 0, count
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if good(middle) else (low, middle - 1)
    return low


def in_words(policy: ExitPolicy) -> str:
    """Return a policy with its thresholds, such as ``decoder: confidence >= 0.9 at 1, 2``."""
    parts = []
    for stream, rule in policy.rules.items():
        layers = ", ".join(str(k) for k in rule.reachable)
        if rule.signal == "static":
            parts.append(f"{stream}: static {layers}")
            continue
        level = " / ".join(f"{t:.3g}" for t in dict.fromkeys(rule.reachable.values()))
        decay = "" if rule.decay is None else " ".join(("", "with decay", *(f"{number:g}" for number in rule.decay)))
        begin = f" from token {rule.from_step + 1}" if rule.from_step else ""
        parts.append(f"{stream}: {rule.signal} >= {level} at {layers}{decay}{begin}")
    if policy.kv_fill != "just-in-time":
        parts.append(f"K/V: {policy.kv_fill}" + (f" beyond {policy.backlog}" if policy.backlog else ""))
    return "; ".join(parts) or "full depth"


def _shallow(decoder: Sequence[int], last: int) -> int:
    """FREE's one shallow exit: a quarter of the stack, as in its scripts for T5-large (6 of 24)."""
    return min(decoder, key=lambda k: abs(k - last / 4))


def _further(keeps: Callable[[Mapping[str, int]], bool], dials: Mapping[str, int], stream: str, more: int) -> bool:
    return keeps({**dials, stream: dials[stream] + more})


def _rules(
    signal: str,
    layers: tuple[int, ...],
    thresholds: Sequence[float] = PROBABILITY,
    decay: tuple[float, float] | None = None,
    from_step: int = 0,
) -> list[ExitRule]:
    return [ExitRule(signal, layers, (t,) * len(layers), decay, from_step) for t in thresholds]
