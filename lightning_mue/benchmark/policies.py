"""The policies that every benchmark compares with calibrated exits."""

from __future__ import annotations

from torch import nn

from lightning_mue.backbones import view
from lightning_mue.benchmark.tuning import static
from lightning_mue.exits import attached, exits_on_the_way
from lightning_mue.policy import ExitPolicy, ExitRule

FULL, FIRST, CALIBRATED = "engine, full depth", "all at first exit", "calibrated exits"
VERIFIED = "verified: its decoder exits draft"


def first_exits(model: nn.Module) -> ExitPolicy:
    """Return the control: every stream left at its first exit."""
    exits = attached(model)
    layers = exits_on_the_way(view(model), exits) if exits is not None else {}
    return ExitPolicy({stream: ExitRule.static(ks[0]) for stream, ks in layers.items()})


def static_depths(model: nn.Module) -> dict[str, ExitPolicy]:
    """Return the policies that always leave the decoder at one of its exits, by name."""
    exits = attached(model)
    layers = exits.layers.get("decoder", ()) if exits is not None else ()
    return {static(k): ExitPolicy({"decoder": ExitRule.static(k)}) for k in layers}
