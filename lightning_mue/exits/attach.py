"""Attach exits to a backbone: one submodule beside its own, nothing of its own changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_mue.backbones import num_layers, view
from lightning_mue.exits.adapter import Adapter
from lightning_mue.exits.config import ExitConfig
from lightning_mue.exits.gate import ExitGate, pool

PREFIX = "mue_exits"
"""Name of the submodule, and so the prefix of every new ``state_dict`` key."""


class Exits(nn.Module):
    """All adapters and gates of a backbone.

    Args:
        config: which exits there are.
        widths: stream name -> width of its states.
    """

    def __init__(self, config: ExitConfig, widths: Mapping[str, int]) -> None:
        super().__init__()
        self.config = config
        self.layers = config.layers()
        names = [(stream, k) for stream, layers in self.layers.items() for k in layers]
        self.adapters = nn.ModuleDict()
        self.gates = nn.ModuleDict()
        for stream, k in names:
            if config.adapter != "none":
                self.adapters[f"{stream}_{k}"] = Adapter(config.adapter, widths[stream], config.adapter_width)
            if config.gate:
                self.gates[f"{stream}_{k}"] = ExitGate(widths[stream], config.gate_width)

    def adapt(self, stream: str, k: int, h: Tensor) -> Tensor:
        """Return what the rest of the model reads when ``stream`` is left after layer ``k``, ``[..., D]``.

        The last layer, and an exit without an adapter, give the state itself.
        """
        name = f"{stream}_{k}"
        return self.adapters[name](h) if name in self.adapters else h

    def gate_logit(self, stream: str, k: int, h: Tensor, valid_BT: Tensor | None = None) -> Tensor:
        """Return the gate's logit: per state for the decoder, per sample (pooled) for other streams."""
        return self.gates[f"{stream}_{k}"](h if stream == "decoder" else pool(h, valid_BT))


def attach_exits(model: nn.Module, config: ExitConfig | Mapping[str, Any]) -> Exits:
    """Register exits as the submodule ``mue_exits`` of ``model``; full-depth outputs stay bit-identical.

    Args:
        model: a supported backbone.
        config: an ExitConfig, or its fields as a mapping.

    Raises:
        TypeError: the model has no view.
        ValueError: unknown streams or layers, or exits are attached already.
    """
    config = ExitConfig.of(config)
    if hasattr(model, PREFIX):
        raise ValueError("Exits are attached already; call `detach_exits(model)` first.")
    backbone = view(model)
    config.check(num_layers(backbone))
    widths = {s.name: s.width for s in backbone.encoders} | {"decoder": backbone.decoder.width}
    like = next(model.parameters())
    exits = Exits(config, widths).to(device=like.device, dtype=like.dtype)
    exits.train(model.training)
    model.add_module(PREFIX, exits)
    return exits


def detach_exits(model: nn.Module) -> Exits:
    """Remove and return the exits of ``model``.

    Raises:
        ValueError: there are none.
    """
    exits = attached(model)
    if exits is None:
        raise ValueError("No exits are attached.")
    delattr(model, PREFIX)
    return exits


def attached(model: nn.Module) -> Exits | None:
    """Return the exits of ``model``, or None."""
    return getattr(model, PREFIX, None)
