"""CoCa's two towers as what compares pictures with texts: streams that may be left early, and their embeddings."""

from __future__ import annotations

from typing import Any

import torch
from open_clip.coca_model import CoCa
from torch import Tensor, nn
from torch.nn.functional import normalize, pad

from lightning_mue.backbones.stream import EncoderStream, Inputs, LayerCall, Outputs, StreamState


class CoCaTextStream:
    """The unimodal half as an encoder of whole texts: open_clip's [CLS] stands after them and becomes the embedding.

    It reads ``text_ids [B, T]``: start token, text, end token, padded on the right with the tower's padding.
    """

    name = "text"

    def __init__(self, coca: CoCa) -> None:
        self._text: Any = coca.text
        self._blocks = self._text.transformer.resblocks
        self.num_layers, self.width = len(self._blocks), self._text.width

    def prologue(self, inputs: Inputs, done: Outputs) -> StreamState:
        """Embeddings, and open_clip's mask of padding and of what comes later, ``[B, T, T]``."""
        ids_BT = inputs["text_ids"]
        h_BTD, mask = self._text._embeds(ids_BT)
        heads = self._text.heads
        if mask is not None:  # open_clip has it once for every head
            mask = mask[::heads] if mask.ndim == 3 else mask.expand(len(h_BTD), -1, -1)
        valid_BT = pad(ids_BT != self._text.pad_id, (0, h_BTD.shape[1] - ids_BT.shape[1]), value=True)  # and [CLS]
        return StreamState(h_BTD, valid_BT, mask)

    def call(self, k: int, state: StreamState) -> LayerCall:
        """One block."""
        tensors = (state.h_BTD,) if state.mask is None else (state.h_BTD, state.mask)
        return LayerCall(_MaskedBlock(self._blocks[k - 1], self._text.heads), tensors, ((0,), (0,))[: len(tensors)])

    def layer(self, k: int, state: StreamState) -> Tensor:
        """Run one block."""
        return self.call(k, state)()

    def epilogue(self, state: StreamState) -> Tensor:
        """Return the states; nothing but the embedding is made of them."""
        return state.h_BTD


class _MaskedBlock(nn.Module):
    """A block whose mask ``[B, T, T]`` is that of all heads; torch's attention wants it once for each."""

    def __init__(self, block: nn.Module, heads: int) -> None:
        super().__init__()
        self.block, self.heads = block, heads

    def forward(self, h_BTD: Tensor, mask: Tensor | None = None) -> Tensor:
        mask = None if mask is None else mask.repeat_interleave(self.heads, 0)
        result_BTD: Tensor = self.block(h_BTD, attn_mask=mask)
        return result_BTD


class CoCaContrast:
    """Pictures and texts in one space (CoCa, section 3.2).

    Args:
        coca: the model.
        image: its image tower's stream.

    Attributes:
        image: stream of pictures.
        text: stream of texts.
    """

    def __init__(self, coca: CoCa, image: EncoderStream) -> None:
        self._coca: Any = coca
        self.image: EncoderStream = image
        self.text: EncoderStream = CoCaTextStream(coca)

    def image_embedding(self, state: StreamState) -> Tensor:
        """Return unit vectors ``[B, E]`` of pictures that left with these states: pooler, norm, projection."""
        visual = self._coca.visual
        pooled = visual._pool(state.h_BTD)[0]
        pooled = pooled[:, 0] if pooled.ndim == 3 else pooled  # a contrastive pooler's single query
        return normalize(pooled if visual.proj is None else pooled @ visual.proj, dim=-1)

    def text_embedding(self, state: StreamState) -> Tensor:
        """Return unit vectors ``[B, E]`` of texts that left with these states."""
        text = self._coca.text
        pooled_BD = text.ln_final(state.h_BTD[:, -1])
        if text.text_projection is None:
            return normalize(pooled_BD, dim=-1)
        if isinstance(text.text_projection, torch.nn.Linear):
            return normalize(text.text_projection(pooled_BD), dim=-1)
        return normalize(pooled_BD @ text.text_projection, dim=-1)

    def logits(self, image_BE: Tensor, text_CE: Tensor) -> Tensor:
        """Return how alike pictures and texts are, ``[B, C]``, at the model's temperature, at most 100 (CLIP)."""
        logits_BC = self._coca.logit_scale.exp().clamp(max=100) * image_BE @ text_CE.T
        return logits_BC if self._coca.logit_bias is None else logits_BC + self._coca.logit_bias

    @property
    def pad_id(self) -> int:
        """The padding of texts."""
        pad_id: int = self._coca.text.pad_id
        return pad_id

    @property
    def longest(self) -> int:
        """Tokens of a text at most, start and end included."""
        longest: int = self._coca.text.context_length
        return longest
