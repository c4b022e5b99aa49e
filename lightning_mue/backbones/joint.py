"""BART's and mBART's encoder as stream ``encoder``: over a text, or over image and text together as in Florence-2."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_mue.backbones.bart import final_norm
from lightning_mue.backbones.stream import Inputs, LayerCall, Outputs, StreamState, additive_mask


class EncoderLayers:
    """What every stream through the encoder's layers shares.

    Args:
        encoder: the ``BartEncoder`` or ``MBartEncoder``.
    """

    def __init__(self, encoder: Any) -> None:
        self._encoder, self._layers, self._norm = encoder, encoder.layers, final_norm(encoder)
        self.num_layers, self.width = len(self._layers), encoder.config.d_model

    def call(self, k: int, state: StreamState) -> LayerCall:
        """One encoder layer."""
        return encoder_call(_EncoderLayer(self._layers[k - 1]), state.h_BTD, state.mask)

    def layer(self, k: int, state: StreamState) -> Tensor:
        """Run one encoder layer."""
        return self._layers[k - 1](state.h_BTD, state.mask)

    def epilogue(self, state: StreamState) -> Tensor:
        """The final norm, where layers are pre-norm: the memory, or this modality's part of it."""
        return self._norm(state.h_BTD)


class _EncoderLayer(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, h_BTD: Tensor, mask: Tensor | None = None) -> Tensor:
        result_BTD: Tensor = self.layer(h_BTD, mask)
        return result_BTD


def encoder_call(module: nn.Module, *tensors: Tensor | None) -> LayerCall:
    """Return a call with states ``[B, T, D]`` and, if there is one, a mask ``[B, 1, 1, S]``."""
    given = tuple(tensor for tensor in tensors if tensor is not None)
    return LayerCall(module, given, tuple((0, 3) if tensor.ndim == 4 else (0, 1) for tensor in given))


class BartEncoderStream(EncoderLayers):
    """A text through the encoder's layers."""

    name = "encoder"

    def prologue(self, inputs: Inputs, done: Outputs) -> StreamState:
        """Embeddings of tokens and positions."""
        ids, valid_BT = inputs["input_ids"], self.valid(inputs)
        h_BTD = _with_positions(self._encoder, ids, self._encoder.embed_tokens(ids))
        return StreamState(h_BTD, valid_BT, additive_mask(valid_BT, h_BTD.dtype))

    def valid(self, inputs: Inputs) -> Tensor | None:
        """Return True at real tokens, ``[B, T]``; None if all are."""
        valid = inputs.get("attention_mask")
        return None if valid is None else valid.bool()


class JointEncoderStream(EncoderLayers):
    """All tokens through the encoder's layers, every one attending to every other.

    Args:
        model: the ``Florence2Model``.
    """

    name = "encoder"

    def __init__(self, model: Any) -> None:
        super().__init__(model.language_model.encoder)
        self._model = model

    def prologue(self, inputs: Inputs, done: Outputs) -> StreamState:
        """Splice the image features into the prompt's embeddings and add positions."""
        h_BTD = joint_embedding(self._model, inputs, done.get("vision"))
        valid = inputs.get("attention_mask")
        valid_BT = None if valid is None else valid.bool()
        return StreamState(h_BTD, valid_BT, additive_mask(valid_BT, h_BTD.dtype))


def joint_embedding(model: Any, inputs: Inputs, features_BND: Tensor | None) -> Tensor:
    """Return what enters the encoder's first layer, ``[B, S, D]``; without features, placeholders stay as they are."""
    ids = inputs["input_ids"]
    h_BSD = model.get_input_embeddings()(ids)
    if features_BND is not None:
        features = features_BND.to(h_BSD.dtype)
        spots = model.get_placeholder_mask(ids, inputs_embeds=h_BSD, image_features=features)
        h_BSD = h_BSD.masked_scatter(spots, features)
    return _with_positions(model.language_model.encoder, ids, h_BSD)


def _with_positions(encoder: Any, ids_BT: Tensor, h_BTD: Tensor) -> Tensor:
    if ids_BT.shape[1] > (most := encoder.config.max_position_embeddings):
        raise ValueError(
            f"The prompt has {ids_BT.shape[1]} tokens, those of an image included; the encoder's "
            f"`max_position_embeddings` is {most}."
        )
    h_BTD = encoder.layernorm_embedding(h_BTD + encoder.embed_positions(ids_BT))
    return nn.functional.dropout(h_BTD, p=encoder.dropout, training=encoder.training)
