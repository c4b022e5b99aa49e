"""UDOP's encoder as a stream: words with boxes and the patches of a page, together through the blocks of a T5.

The patch under a word is added to it; patches under no word follow the words, in their order. The bias is of distances
along the sequence, across and down the page (Tang et al., CVPR 2023, section 3.1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.udop.modeling_udop import get_visual_bbox

from lightning_mue.backbones.stream import Inputs, Outputs, StreamState
from lightning_mue.backbones.t5 import T5EncoderStream

UNREAD = ("decoder.embed_patches.", "decoder.relative_bias.")
"""Prefixes of weights that a UDOP's decoder has, for it is of its encoder's class, and never reads."""


class UdopEncoderStream:
    """All words and patches through the encoder's blocks.

    transformers' own arrangement of them loops over all words; this one is a sort, and so can be part of a graph.

    Args:
        encoder: the backbone's encoder.
    """

    name = "encoder"

    def __init__(self, encoder: Any) -> None:
        self._encoder, self._blocks = encoder, T5EncoderStream(encoder)
        self.num_layers, self.width = self._blocks.num_layers, self._blocks.width
        self.call, self.layer, self.epilogue = self._blocks.call, self._blocks.layer, self._blocks.epilogue
        self._side = encoder.config.image_size // encoder.config.patch_size

    def prologue(self, inputs: Inputs, done: Outputs) -> StreamState:
        """Embeddings of words and patches, and the mask, which the boxes make.

        Raises:
            ValueError: words without boxes.
        """
        if inputs.get("bbox") is None:
            raise ValueError("UDOP reads words where they stand; give `bbox`, [B, T, 4] between 0 and 1, beside them")
        encoder, valid_BS = self._encoder, self.valid(inputs)
        h_BSD, box_BS4 = encoder.embed_tokens(inputs["input_ids"]), inputs["bbox"]
        if inputs.get("pixel_values") is not None:
            h_BSD, box_BS4 = self._with_patches(h_BSD, box_BS4, inputs["pixel_values"])
        h_BSD = h_BSD + encoder.cell_2d_embedding(box_BS4)
        ones_BS = torch.ones(h_BSD.shape[:2], device=h_BSD.device)  # it counts them
        bias = encoder.relative_bias(attention_mask=ones_BS, bbox=box_BS4)
        return self._blocks.masked(h_BSD, valid_BS, bias)

    def valid(self, inputs: Inputs) -> Tensor | None:
        """Return True at words that are no padding and at patches under no word, ``[B, T + P]``; None if all count.

        As in transformers, the room that other patches leave counts where there is no ``attention_mask``.
        """
        valid_BT = self._blocks.valid(inputs)
        if valid_BT is None or inputs.get("pixel_values") is None:
            return valid_BT
        free_BP = ~self._covered(self._patch_of(inputs["bbox"]))
        at_P = torch.arange(free_BP.shape[1], device=free_BP.device)
        return torch.cat([valid_BT, at_P < free_BP.sum(1, keepdim=True)], 1)

    def _with_patches(self, h_BTD: Tensor, box_BT4: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the states and boxes of words and, after them, of the patches under no word, and zeros to the end."""
        patch_BPD = self._encoder.embed_patches(pixels.to(self._encoder.embed_patches.proj.weight.dtype))
        at_BT = self._patch_of(box_BT4)
        box_BT4 = box_BT4.to(_exact(box_BT4))
        nowhere_BT = (box_BT4.mean(-1) == 0) | (box_BT4.mean(-1) == 1)  # special tokens and padding
        under_BTD = patch_BPD.gather(1, _wide(at_BT, patch_BPD)).masked_fill(nowhere_BT[..., None], 0)
        covered_BP = self._covered(at_BT)
        at_P = torch.arange(covered_BP.shape[1], device=covered_BP.device)
        order_BP = torch.where(covered_BP, at_P + len(at_P), at_P).argsort(1)
        gone_BP1 = covered_BP.gather(1, order_BP)[..., None]
        config = self._encoder.config
        grid_P4 = get_visual_bbox(config.image_size, config.patch_size).to(box_BT4)
        rest_BPD = patch_BPD.gather(1, _wide(order_BP, patch_BPD)).masked_fill(gone_BP1, 0)
        grid_BP4 = grid_P4[order_BP].masked_fill(gone_BP1, 0)
        return torch.cat([h_BTD + under_BTD, rest_BPD], 1), torch.cat([box_BT4, grid_BP4], 1)

    def _patch_of(self, box_BT4: Tensor) -> Tensor:
        """Return the patch under the middle of each word, ``[B, T]``."""
        column_BT, row_BT = (
            ((box_BT4[..., i] + box_BT4[..., i + 2]) / 2.0 * self._side).floor().long().clip(0, self._side - 1)
            for i in (0, 1)
        )
        return column_BT + row_BT * self._side

    def _covered(self, at_BT: Tensor) -> Tensor:
        """Return True at patches under a word, padding's too, ``[B, P]``."""
        none_BP = torch.zeros(at_BT.shape[0], self._side**2, dtype=torch.bool, device=at_BT.device)
        return none_BP.scatter(1, at_BT, torch.ones_like(at_BT, dtype=torch.bool))


def _wide(at_BT: Tensor, like_BPD: Tensor) -> Tensor:
    return at_BT[..., None].expand(-1, -1, like_BPD.shape[-1])


def _exact(box: Tensor) -> torch.dtype:
    """Return in what transformers computes with boxes, lest another rounding choose another bucket."""
    return torch.float32 if box.device.type == "mps" else torch.float64
