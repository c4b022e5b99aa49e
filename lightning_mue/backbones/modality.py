"""MuE's modality decomposition of an encoder: streams ``image`` and ``text`` through the same layers, each alone.

The weights are tied, so nothing is added (Tang et al., CVPR 2023, section 3.1). Text keeps the positions that it has in
the joint sequence. The decoder's memory is ``[image; text]``; its cross-attention knows no order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_mue.backbones.bart import is_prenorm
from lightning_mue.backbones.joint import EncoderLayers, encoder_call, joint_embedding
from lightning_mue.backbones.stream import EncoderKind, Inputs, LayerCall, Outputs, StreamState, additive_mask


class ImageStream(EncoderLayers):
    """The image tokens alone through the encoder's layers.

    Args:
        model: the ``Florence2Model``.
    """

    name = "image"

    def __init__(self, model: Any) -> None:
        super().__init__(model.language_model.encoder)
        self._model = model

    def prologue(self, inputs: Inputs, done: Outputs) -> StreamState:
        """Image features with their positions in the joint sequence."""
        image_BN, _ = split_modalities(inputs, self._model.config.image_token_id, done["vision"].shape[1])
        return StreamState(_take(joint_embedding(self._model, inputs, done["vision"]), image_BN))


class TextStream(EncoderLayers):
    """The prompt's tokens through the encoder's layers: alone, or reading the states with which the image left.

    Args:
        model: the ``Florence2Model``.
        reads_image: one-way fusion: keys and values are those of the image's exit states and of the text.
    """

    name = "text"

    def __init__(self, model: Any, reads_image: bool) -> None:
        super().__init__(model.language_model.encoder)
        self._model = model
        self._reads_image, self._prenorm = reads_image, is_prenorm(model.language_model.encoder)

    def prologue(self, inputs: Inputs, done: Outputs) -> StreamState:
        """Embeddings of the prompt's tokens with their positions in the joint sequence."""
        image_BN, text_BT = split_modalities(inputs, self._model.config.image_token_id, done["vision"].shape[1])
        h_BTD = _take(joint_embedding(self._model, inputs, None), text_BT)
        valid = inputs.get("attention_mask")
        valid_BT = None if valid is None else valid.gather(1, text_BT).bool()
        if not self._reads_image:
            return StreamState(h_BTD, valid_BT, additive_mask(valid_BT, h_BTD.dtype))
        both = None if valid_BT is None else torch.cat([torch.ones_like(image_BN, dtype=torch.bool), valid_BT], 1)
        return StreamState(h_BTD, valid_BT, additive_mask(both, h_BTD.dtype), done["image"])

    def call(self, k: int, state: StreamState) -> LayerCall:
        """One encoder layer."""
        if state.beside_BSD is None:
            return super().call(k, state)
        module = _ReadingLayer(self._layers[k - 1], self._prenorm)
        return encoder_call(module, state.h_BTD, state.beside_BSD, state.mask)

    def layer(self, k: int, state: StreamState) -> Tensor:
        """Run one encoder layer."""
        return super().layer(k, state) if state.beside_BSD is None else self.call(k, state)()


class _ReadingLayer(nn.Module):
    """An encoder layer that also reads states beside its own."""

    def __init__(self, layer: Any, prenorm: bool) -> None:
        super().__init__()
        self.layer, self.norm = layer, layer.self_attn_layer_norm if prenorm else nn.Identity()

    def forward(self, h_BTD: Tensor, beside_BSD: Tensor, mask: Tensor | None = None) -> Tensor:
        read_BSD = self.norm(torch.cat([beside_BSD, h_BTD], 1))
        result_BTD: Tensor = self.layer(h_BTD, mask, key_value_states=read_BSD)
        return result_BTD


def modality_streams(model: Any, kind: EncoderKind) -> tuple[ImageStream, TextStream]:
    """Return the two streams of a ``Florence2Model``, in the order they run."""
    return ImageStream(model), TextStream(model, reads_image=kind == "one-way")


def split_modalities(inputs: Inputs, image_token_id: int, features: int = 0) -> tuple[Tensor, Tensor]:
    """Return the positions of image tokens ``[B, N]`` and of all others ``[B, T]`` in ``input_ids``, in order.

    A graph cannot count tokens and takes as many as there are image ``features``.

    Raises:
        ValueError: rows with different numbers of image tokens, or no text, or no image.
    """
    is_image_BS = inputs["input_ids"] == image_token_id
    counts = [features] if torch.compiler.is_exporting() else is_image_BS.sum(1).tolist()
    if len(set(counts)) != 1:
        raise ValueError(f"Every row of `input_ids` must hold as many image tokens as the others, got {counts}")
    if not 0 < counts[0] < is_image_BS.shape[1]:
        raise ValueError(
            f"`input_ids` must hold image and text, got {counts[0]} image tokens of {is_image_BS.shape[1]}"
        )
    order_BS = modality_order(inputs, image_token_id)
    return order_BS[:, : counts[0]], order_BS[:, counts[0] :]


def modality_order(inputs: Inputs, image_token_id: int) -> Tensor:
    """Return the positions of image tokens and then of all others, ``[B, S]``."""
    is_image_BS = inputs["input_ids"] == image_token_id
    size = is_image_BS.shape[1]
    at_S = torch.arange(size, device=is_image_BS.device)
    return torch.where(is_image_BS, at_S - size, at_S).argsort(1)


def _take(h_BSD: Tensor, index_BT: Tensor) -> Tensor:
    return h_BSD.gather(1, index_BT.unsqueeze(-1).expand(-1, -1, h_BSD.shape[-1]))
