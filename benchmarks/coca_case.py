"""What the cost table of a CoCa (``coca_cost.py``) captions, and what open_clip's own modules say of it.

Shapes: ``B`` rows, ``S`` picture tokens, ``T`` steps, ``D`` width, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from decode_case import ragged_depths
from decode_lines import ROUNDING
from torch import Tensor

from lightning_mue.backbones import build_backbone, view
from lightning_mue.exits import attach_exits


@dataclass(frozen=True)
class Schedule:
    """Depths to leave at.

    Args:
        vision: of all pictures.
        decoder: row -> of each token.
    """

    vision: int
    decoder: list[list[int]]


@dataclass(frozen=True)
class Case:
    """What all lines of a batch size caption.

    Args:
        model: with exits.
        pixel_values: ``[B, 3, H, W]``.
        steps: tokens of each caption; nothing ends one.
        schedules: name -> depths.
    """

    model: Any
    pixel_values: Tensor
    steps: int
    schedules: Mapping[str, Schedule]

    @property
    def start_id(self) -> int:
        """The token before captions."""
        return view(self.model).decode_settings(self.steps).start_id


@torch.no_grad()
def random_model(source: str | Mapping[str, Any], seed: int) -> Any:
    """Return a CoCa with exits half-way up its tower and after every layer of its multimodal half.

    Positions weigh more than tokens, which would otherwise choose themselves again and again.
    """
    torch.manual_seed(seed)
    model: Any = build_backbone(source)
    text = model.coca.text
    text.positional_embedding.normal_(std=6 * float(text.token_embedding.weight.std()))
    decoder, vision = view(model).decoder, view(model).encoders[0]
    exits = list(range(decoder.first_exit, decoder.num_layers))
    attach_exits(model, {"vision": sorted({1, vision.num_layers // 2}), "decoder": exits})
    return model.eval().requires_grad_(False)


def make_case(model: Any, batch: int, steps: int, seed: int) -> Case:
    """Return pictures of noise, and depths: full, half-way, ragged about half-way, everything at its first exit."""
    decoder, vision = view(model).decoder, view(model).encoders[0]
    size = model.coca.visual.image_size
    pixels = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))
    below, layers = decoder.first_exit - 1, decoder.num_layers - decoder.first_exit + 1
    half, ragged = layers // 2, ragged_depths(batch, steps, layers, layers // 2, seed)

    def all_at(depth: int) -> list[list[int]]:
        return [[below + depth] * steps for _ in range(batch)]

    schedules = {
        "full": Schedule(vision.num_layers, all_at(layers)),
        "static": Schedule(vision.num_layers // 2, all_at(half)),
        "ragged": Schedule(vision.num_layers // 2, [[below + depth for depth in row] for row in ragged]),
        "first": Schedule(1, all_at(1)),
    }
    return Case(model, pixels, steps, schedules)


def share_right(case: Case, schedule: Schedule, tokens_BT: Tensor) -> float:
    """Return the share of tokens that open_clip's modules, reading whole captions at once, choose at these depths."""
    coca = case.model.coca
    h_BSD = coca.visual._embeds(case.pixel_values)
    for block in coca.visual.transformer.resblocks[: schedule.vision]:
        h_BSD = block(h_BSD)
    image_BSD = coca.visual._pool(h_BSD)[1]
    start_B1 = torch.full_like(tokens_BT[:, :1], case.start_id)
    h_BTD, decoder = coca.text(torch.cat([start_B1, tokens_BT[:, :-1]], 1))[1], coca.text_decoder
    below, steps = len(coca.text.transformer.resblocks), tokens_BT.shape[1]
    depth_BT, logits_BTV = torch.tensor(schedule.decoder), None
    for k, (block, cross) in enumerate(zip(decoder.resblocks, decoder.cross_attn, strict=True), below + 1):
        h_BTD = cross(block(h_BTD, attn_mask=decoder.attn_mask[:steps, :steps]), k_x=image_BSD, v_x=image_BSD)
        if (left_BT := depth_BT == k).any():
            at_k_BTV = decoder.ln_final(h_BTD) @ decoder.text_projection
            logits_BTV = at_k_BTV if logits_BTV is None else torch.where(left_BT[..., None], at_k_BTV, logits_BTV)
    assert logits_BTV is not None
    logits_BTV[..., coca.pad_id] = -torch.inf
    short_BT = logits_BTV.amax(-1) - logits_BTV.gather(-1, tokens_BT[..., None])[..., 0]
    return float((short_BT <= ROUNDING).float().mean())
