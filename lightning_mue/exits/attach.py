"""Attach exits to a backbone: one submodule beside its own, nothing of its own changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mue.backbones import EXITS, Backbone, DecoderStream, exit_streams, num_layers, unwrapped, view
from lightning_mue.exits.adapter import Adapter
from lightning_mue.exits.config import ExitConfig
from lightning_mue.exits.gate import ExitGate, pool, top_two


class Exits(nn.Module):
    """All adapters and gates of a backbone.

    Args:
        config: which exits there are.
        widths: stream name -> width of its states.
        vocab_size: rows of the vocabulary head.

    Attributes:
        shortlist: the tokens over which the decoder's gates see how sure an exit is, int64 ``[S]``, or None: those of
            ``set_shortlist``, until then the first ones.
    """

    shortlist: Tensor | None

    def __init__(self, config: ExitConfig, widths: Mapping[str, int], vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.layers = config.layers()
        self.encoder = config.encoder_kind
        names = [(stream, k) for stream, layers in self.layers.items() for k in layers]
        self.adapters = nn.ModuleDict()
        self.gates = nn.ModuleDict()
        for stream, k in names:
            if config.adapter != "none":
                self.adapters[f"{stream}_{k}"] = Adapter(config.adapter, widths[stream], config.adapter_width)
            if config.gate:
                beside = 2 if config.shortlist and stream == "decoder" else 0
                self.gates[f"{stream}_{k}"] = ExitGate(widths[stream], config.gate_width, beside)
        # In the state_dict, so that checkpoints, bundles and fingerprints hold it.
        size = min(config.shortlist, vocab_size)
        self.register_buffer("shortlist", torch.arange(size) if size else None)

    def adapt(self, stream: str, k: int, h: Tensor) -> Tensor:
        """Return what the rest of the model reads when ``stream`` is left after layer ``k``, ``[..., D]``.

        The last layer, and an exit without an adapter, give the state itself.
        """
        name = f"{stream}_{k}"
        return self.adapters[name](h) if name in self.adapters else h

    def gate_logit(
        self,
        stream: str,
        k: int,
        h: Tensor,
        valid_BT: Tensor | None = None,
        rows: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Return the gate's logit: per state for the decoder, per sample (pooled) for other streams.

        Args:
            stream: the stream's name.
            k: the exit's layer.
            h: states ``[..., D]``.
            valid_BT: True at real tokens, None if all are; not for the decoder.
            rows: of ``shortlist_head``; for the decoder.
        """
        gate = self.gates[f"{stream}_{k}"]
        if stream != "decoder":
            return gate(pool(h, valid_BT))
        if rows is None:
            return gate(h)
        with torch.no_grad():
            sure = top_two(rows(self.adapt(stream, k, h)))
        return gate(h, sure)

    def shortlist_head(self, decoder: DecoderStream) -> Callable[[Tensor], Tensor] | None:
        """Return what maps exit states ``[..., D]`` to the shortlist's logits ``[..., S]``; None without a shortlist.

        The head's rows are gathered once, as they are now.
        """
        if self.shortlist is None:
            return None
        with torch.no_grad():
            rows = decoder.head_rows(self.shortlist)
        return lambda h: rows(decoder.norm(h))

    @torch.no_grad()
    def set_shortlist(self, counts_V: Tensor) -> None:
        """Make the most frequent tokens the shortlist; of equally frequent ones the first.

        Args:
            counts_V: how often each token occurs in the training labels.

        Raises:
            ValueError: the exits have no shortlist.
        """
        if self.shortlist is None:
            raise ValueError("These exits have no shortlist; attach them with `shortlist` in their ExitConfig.")
        order_V = counts_V.argsort(descending=True, stable=True)
        self.shortlist.copy_(order_V[: len(self.shortlist)].sort().values)


def attach_exits(model: nn.Module, config: ExitConfig | Mapping[str, Any]) -> Exits:
    """Register exits as the submodule ``mue_exits`` of ``model``; full-depth outputs stay bit-identical.

    Args:
        model: a supported backbone; exits of one that PEFT wraps are inside, beside its layers.
        config: an ExitConfig, or its fields as a mapping.

    Raises:
        TypeError: the model has no view.
        ValueError: unknown streams or layers, exits are attached already, or each rank holds a part of the weights.
    """
    config, model = ExitConfig.of(config), unwrapped(model)
    if hasattr(model, EXITS):
        raise ValueError("Exits are attached already; call `detach_exits(model)` first.")
    if sharded := next((n for n, p in model.named_parameters() if type(p).__name__ == "DTensor"), None):
        raise ValueError(
            f"{sharded} is sharded, and exits that come later would be whole, each rank's with gradients of its own; "
            "call `attach_exits` before `fully_shard`."
        )
    backbone = view(model, config.encoder_kind)
    config.check(exit_streams(backbone), {"decoder": backbone.decoder.first_exit})
    widths = {s.name: s.width for s in backbone.encoders} | {"decoder": backbone.decoder.width}
    if backbone.contrastive is not None:
        widths["text"] = backbone.contrastive.text.width
    like = next(model.parameters())
    exits = Exits(config, widths, backbone.decoder.vocab_size).to(device=like.device, dtype=like.dtype)
    exits.train(model.training)
    model.add_module(EXITS, exits)
    if hasattr(getattr(model, "config", None), "to_diff_dict"):  # transformers' own, which `save_pretrained` writes
        setattr(model.config, EXITS, config.to_dict())
    return exits


def exits_on_the_way(backbone: Backbone, exits: Exits) -> dict[str, tuple[int, ...]]:
    """Return stream name -> exit layers of the streams that an answer passes: not of one that only compares."""
    passed = num_layers(backbone)
    return {name: layers for name, layers in exits.layers.items() if name in passed}


def detach_exits(model: nn.Module) -> Exits:
    """Remove and return the exits of ``model``.

    Raises:
        ValueError: there are none.
    """
    exits, model = attached(model), unwrapped(model)
    if exits is None:
        raise ValueError("No exits are attached.")
    delattr(model, EXITS)
    if hasattr(getattr(model, "config", None), "to_diff_dict"):
        vars(model.config).pop(EXITS, None)
    return exits


def attached(model: nn.Module) -> Exits | None:
    """Return the exits of ``model``, or None."""
    return getattr(unwrapped(model), EXITS, None)
