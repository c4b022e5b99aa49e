"""The methods compared: each one a family of policies from safe to bold, obeyed by the same engine.

What a method's own code does beside its exits (MuE's vocabulary projection after every layer, FREE's distillation) is
not charged to it and not given to it: one model, one engine, one decoding, so that only the rule differs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from lightning_mue.policy import ExitPolicy, ExitRule

Layers = Mapping[str, Sequence[int]]
"""Stream name -> exit layers."""

PROBABILITY = (0.999, 0.995, 0.99, 0.97, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0)
COSINE = (0.999, 0.998, 0.995, 0.99, 0.98, 0.97, 0.95, 0.9, 0.85, 0.8, 0.7, 0.5, 0.3, 0.0, -1.0)
"""The one dial of each method, from hardly ever to always; where it has several thresholds, they move together."""
MUE_DECAY = (0.95, 1.0)
"""MuE, appendix A: beta and tau of the caption model."""
CALM_DECAY = (0.9, 4.0)
"""CALM, equation 5: beta is the paper's, tau ours."""
STATIC = "static decoder depth"


def families(
    layers: Layers, num_layers: Mapping[str, int], steps: int, gates: bool = True
) -> dict[str, list[ExitPolicy]]:
    """Return method -> its policies from safe to bold.

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
    patience = [ExitRule("patience", decoder, (float(k),) * len(decoder)) for k in range(len(decoder), 1, -1)]
    protected = -(-steps // 3)
    found = {
        STATIC: [_only(ExitRule.static(k)) for k in sorted(decoder, reverse=True)],
        "MuE": [
            ExitPolicy(_all(encoders, "similarity", t) | {"decoder": _rule("similarity", decoder, t, MUE_DECAY)})
            for t in COSINE
        ],
        "mue-as-published": [
            ExitPolicy(
                _all(encoders, "flat_similarity", t)
                | {"decoder": _rule("flat_similarity", decoder, t, (0.9, 1.0), protected)},
                kv_fill="copy",
            )
            for t in COSINE
        ],
        "DEED": [_only(_rule("confidence", decoder, t)) for t in PROBABILITY],
        "MuE encoder + DEED decoder": [
            ExitPolicy(_all(encoders, "similarity", c) | {"decoder": _rule("confidence", decoder, t)})
            for t, c in zip(PROBABILITY, COSINE, strict=True)
        ],
        "CALM": [
            ExitPolicy({"decoder": _rule("margin", decoder, t, CALM_DECAY)}, kv_fill="propagate") for t in PROBABILITY
        ],
        "FREE": [_only(_rule("confidence", (_shallow(decoder, last),), t)) for t in PROBABILITY],
        "patience": [_only(rule) for rule in patience],
        "entropy": [_only(_rule("entropy", decoder, t)) for t in PROBABILITY],
        "gate": [_only(_rule("gate", decoder, t)) for t in PROBABILITY if gates],
    }
    if not encoders:
        del found["MuE encoder + DEED decoder"]  # it would be DEED once more
    return {method: family for method, family in found.items() if family}


def kv_modes(decoder: Sequence[int], signal: str) -> dict[str, list[ExitPolicy]]:
    """Return K/V mode -> policies from safe to bold that differ in nothing else."""
    modes: dict[str, tuple[str, int]] = {
        "just-in-time": ("just-in-time", 0),
        "propagate": ("propagate", 0),
        "propagate beyond 2": ("propagate", 2),
        "propagate beyond 6": ("propagate", 6),
        "copy": ("copy", 0),
    }
    return {
        name: [ExitPolicy({"decoder": _rule(signal, tuple(decoder), t)}, *mode) for t in PROBABILITY]
        for name, mode in modes.items()
    }


def boldest(family: Sequence[ExitPolicy], quality_of: Callable[[ExitPolicy], float], least: float) -> ExitPolicy | None:
    """Return the boldest policy of ``family`` (safe to bold) whose quality is at least ``least``.

    Found by bisection, which takes quality to fall along the family; where chance makes it rise again, what is found
    keeps ``least`` and the next bolder one does not. The same rule for every method, static depths included.

    Args:
        family: from safe to bold.
        quality_of: decodes for real, on other data than that on which the methods are then compared.
        least: quality to keep.

    Returns:
        None if the safest does not keep it, nor any bolder one that was tried.
    """
    found: ExitPolicy | None = None
    low, high = 0, len(family) - 1
    while low <= high:
        middle = (low + high) // 2
        if quality_of(family[middle]) >= least:
            found, low = family[middle], middle + 1
        else:
            high = middle - 1
    return found


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


def _rule(
    signal: str, layers: tuple[int, ...], t: float, decay: tuple[float, float] | None = None, from_step: int = 0
) -> ExitRule:
    return ExitRule(signal, layers, (t,) * len(layers), decay, from_step)


def _all(streams: Mapping[str, tuple[int, ...]], signal: str, t: float) -> dict[str, ExitRule]:
    return {stream: _rule(signal, layers, t) for stream, layers in streams.items()}


def _only(decoder: ExitRule) -> ExitPolicy:
    return ExitPolicy({"decoder": decoder})
