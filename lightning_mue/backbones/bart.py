"""The BART family's decoder as a decoder stream: the layers of transformers themselves, fed with our K/V buffers.

BART and TrOCR are post-norm, mBART is pre-norm with a final norm. A TrOCR may have sinusoidal positions and no norm of
the embeddings, and read a memory of another width. They are alike in all else that matters here.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_mue.backbones.decoder import DecoderLayers, LayerCache
from lightning_mue.backbones.pieces import LayerPieces, bart_pieces


def is_prenorm(stack: Any) -> bool:
    """Whether the layers of a BART or mBART encoder or decoder norm their input instead of their output."""
    return hasattr(stack, "layer_norm")


def final_norm(stack: Any) -> nn.Module:
    """Return what an encoder or decoder applies after its last layer."""
    return stack.layer_norm if is_prenorm(stack) else nn.Identity()


class BartDecoderStream(DecoderLayers):
    """A ``BartDecoder``, ``MBartDecoder`` or ``TrOCRDecoder`` and the head above it.

    Args:
        decoder: the backbone's decoder.
        head: the vocabulary head.
    """

    def __init__(self, decoder: Any, head: nn.Linear) -> None:
        super().__init__(final_norm(decoder), head)
        self._decoder, self._prenorm = decoder, is_prenorm(decoder)
        config = self._decoder.config
        self.num_layers = len(self._decoder.layers)
        self.width = config.d_model
        self.num_heads = self.num_kv_heads = config.decoder_attention_heads
        self.head_dim = config.d_model // config.decoder_attention_heads
        self.memory_width = self._decoder.layers[0].encoder_attn.k_proj.in_features
        self.max_positions = config.max_position_embeddings

    def embed_at(self, ids_BT: Tensor, positions_T: Tensor) -> Tensor:
        """Token and position embeddings, as the decoder's own ``forward`` adds them."""
        decoder = self._decoder
        h_BTD = decoder.embed_tokens(ids_BT)
        h_BTD = h_BTD + self._positions(ids_BT, positions_T).to(h_BTD.dtype)
        if decoder.layernorm_embedding is not None:
            h_BTD = decoder.layernorm_embedding(h_BTD)
        return nn.functional.dropout(h_BTD, p=decoder.dropout, training=decoder.training)

    def self_kv(self, k: int, h_BTD: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """K and V of layer ``k``'s self-attention, of its normed input where the layer is pre-norm."""
        layer = self._decoder.layers[k - 1]
        own, x_BTD = layer.self_attn, layer.self_attn_layer_norm(h_BTD) if self._prenorm else h_BTD
        return self._heads(own.k_proj(x_BTD)), self._heads(own.v_proj(x_BTD))

    def memory_kv(self, k: int, memory_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of layer ``k``'s cross-attention."""
        cross = self._decoder.layers[k - 1].encoder_attn
        return self._heads(cross.k_proj(memory_BSD)), self._heads(cross.v_proj(memory_BSD))

    def pieces(self, k: int) -> LayerPieces:
        """Layer ``k`` cut at its attentions."""
        return bart_pieces(self._decoder.layers[k - 1], self.num_heads, self._prenorm)

    def _run(
        self,
        k: int,
        h_BTD: Tensor,
        memory_BSD: Tensor,
        self_mask: Tensor | None,
        memory_mask: Tensor | None,
        cache: LayerCache | None,
    ) -> Tensor:
        if self_mask is not None:  # TrOCR's attention broadcasts no mask
            self_mask = self_mask.expand(len(h_BTD), -1, -1, -1)
        found = self._decoder.layers[k - 1](
            h_BTD,
            self_mask,
            memory_BSD,
            encoder_attention_mask=memory_mask,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        result_BTD: Tensor = found[0] if isinstance(found, tuple) else found  # of TrOCR a tuple
        return result_BTD

    def _positions(self, ids_BT: Tensor, positions_T: Tensor) -> Tensor:
        positions = self._decoder.embed_positions
        if isinstance(positions, nn.Embedding):
            return positions(ids_BT, position_ids=positions_T)
        if (
            positions.weights.device != ids_BT.device
        ):  # no weights: `.to` does not move them, nor does loading make them
            size = (len(positions.weights), positions.embedding_dim, positions.padding_idx)
            positions.weights = positions.get_embedding(*size).to(ids_BT.device)
        # They leave padding out, so they are of tokens, each of which is asked about as a step of its own.
        of_token = positions_T.expand(ids_BT.shape).reshape(-1, 1)
        return positions(ids_BT.reshape(-1, 1), of_token).view(*ids_BT.shape, -1)
