"""Plain vision transformers of transformers as a stream: ViT's, DeiT's, BLIP's and SigLIP's."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_mue.backbones.stream import Inputs, LayerCall, Outputs, StreamState


class ViTStream:
    """Embeddings, layers and a final norm; all tokens, those of the classes too, are the decoder's to read.

    Args:
        embeddings: pixels -> patches, class tokens and positions.
        layers: states -> states.
        norm: the final one.
        masks: given to layers beside the states, where they want a mask named: none.
    """

    name = "vision"

    def __init__(self, embeddings: nn.Module, layers: Any, norm: Any, masks: tuple[None, ...] = ()) -> None:
        self._embeddings, self._layers, self._norm, self._masks = embeddings, layers, norm, masks
        self.num_layers, self.width = len(layers), norm.normalized_shape[0]

    def prologue(self, inputs: Inputs, done: Outputs) -> StreamState:
        """Patches, class tokens and positions."""
        return StreamState(self._embeddings(inputs["pixel_values"].to(self._norm.weight.dtype)))

    def call(self, k: int, state: StreamState) -> LayerCall:
        """One layer."""
        return LayerCall(_Layer(self._layers[k - 1], self._masks), (state.h_BTD,), ((0, 1),))

    def layer(self, k: int, state: StreamState) -> Tensor:
        """Run one layer."""
        return self._layers[k - 1](state.h_BTD, *self._masks)

    def epilogue(self, state: StreamState) -> Tensor:
        """The final norm."""
        return self._norm(state.h_BTD)


class _Layer(nn.Module):
    """A layer whose input has the name that all streams' states have in a graph."""

    def __init__(self, layer: nn.Module, masks: tuple[None, ...]) -> None:
        super().__init__()
        self.layer, self.masks = layer, masks

    def forward(self, h_BTD: Tensor) -> Tensor:
        result_BTD: Tensor = self.layer(h_BTD, *self.masks)
        return result_BTD
