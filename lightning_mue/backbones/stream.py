"""What the rest of the package sees of a model: streams of layers.

A stream is ``prologue -> layers -> epilogue``; only its layers may be left early. A view owns no weights and changes no
module of the backbone. Shapes: ``B`` batch, ``T`` positions, ``D`` width, ``S`` memory tokens, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from lightning_mue.backbones.pieces import LayerPieces

Inputs = Mapping[str, Any]
Outputs = Mapping[str, Tensor]
"""Stream name -> what its epilogue gave, of the streams that have run."""

EncoderKind = Literal["joint", "decomposed", "one-way"]
"""How image and text meet in the encoder: all tokens together as pretrained; each modality alone through the same
layers (MuE, section 3.1); or so, but text reads the states with which the image left."""
TokenProcessor = Callable[[Tensor, Tensor, Sequence[int]], Tensor]
"""(ids so far ``[R, t]``, logits ``[R, V]``, the batch's row of each) -> logits."""


@dataclass
class StreamState:
    """States of some rows in a stream left once per sample, with what its layers need beside them.

    Args:
        h_BTD: the states.
        valid_BT: True at real tokens, None if all are.
        mask: additive attention mask, batch first, or None.
        beside_BSD: states of another stream that the layers read, batch first, or None.
        grid: height and width of the picture that the positions make up, where the layers need it.
    """

    h_BTD: Tensor
    valid_BT: Tensor | None = None
    mask: Tensor | None = None
    beside_BSD: Tensor | None = None
    grid: tuple[int, int] | None = None

    def rows(self, index: Tensor) -> StreamState:
        """Return the state of the rows at ``index`` alone."""
        pick = lambda t: None if t is None else t[index]  # noqa: E731
        return StreamState(self.h_BTD[index], pick(self.valid_BT), pick(self.mask), pick(self.beside_BSD), self.grid)

    def at(self, h_BTD: Tensor) -> StreamState:
        """Return the same rows with other states."""
        return replace(self, h_BTD=h_BTD)


@dataclass(frozen=True)
class LayerCall:
    """One run of a layer as what it is: a module, and tensors of which the first are the states.

    Args:
        module: tensors -> new states ``[B, T, D]``.
        tensors: what it is given.
        free: for each tensor, the axes along which another call may be of another size.
    """

    module: nn.Module
    tensors: tuple[Tensor, ...]
    free: tuple[tuple[int, ...], ...]

    def __call__(self) -> Tensor:
        """Run it."""
        result_BTD: Tensor = self.module(*self.tensors)
        return result_BTD


class EncoderStream(Protocol):
    """A stream left once per sample (vision, encoder, image, text)."""

    name: str
    num_layers: int
    width: int

    def prologue(self, inputs: Inputs, done: Outputs) -> StreamState:
        """Return the states that enter layer 1; ``done`` holds what the streams before this one gave."""

    def call(self, k: int, state: StreamState) -> LayerCall:
        """Return what runs layer ``k`` (counted from 1) on these states."""

    def layer(self, k: int, state: StreamState) -> Tensor:
        """Run layer ``k`` and return the new states ``[B, T, D]``."""

    def epilogue(self, state: StreamState) -> Tensor:
        """Return what later streams (or the decoder) read."""


class LayerKV(Protocol):
    """One decoder layer's K/V for the rows of one call."""

    first: int
    """The first of the new positions, which are the same ones in all rows."""

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new positions' K/V ``[R, heads, m, d]``; return those of all positions up to them."""

    def memory(self) -> tuple[Tensor, Tensor]:
        """Return the projected memory K/V, each ``[R, heads, S, d]``."""


class DecoderStream(Protocol):
    """The stream left once per token, with a cache."""

    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int
    """Of keys and values; where they are fewer, adjacent queries share them."""
    head_dim: int
    memory_width: int
    """Of what cross-attention reads."""
    max_positions: int
    vocab_size: int
    first_exit: int
    """The first layer after which a token may leave."""

    def reads_memory(self, k: int) -> bool:
        """Whether layer ``k`` has cross-attention."""

    def embed(self, ids_BT: Tensor, first: int) -> Tensor:
        """Return the states that enter layer 1 for tokens at positions ``first, first + 1, ...``."""

    def embed_at(self, ids_BT: Tensor, positions_T: Tensor) -> Tensor:
        """Return the same for positions that are named."""

    def distance_bias(self) -> Tensor | None:
        """Return what self-attention adds to the scores of the position ``n`` back, ``[heads, N]``, or None.

        All positions farther back than the table is long get its last numbers.
        """

    def window(self, k: int) -> int | None:
        """Return how many positions self-attention of layer ``k`` sees, its own included; None: all before it."""

    def self_kv(self, k: int, h_BTD: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Project what enters layer ``k``, from position ``first`` on, for its self-attention: K and V, as below."""

    def memory_kv(self, k: int, memory_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Project the memory for layer ``k``'s cross-attention: K and V, each ``[B, kv heads, S, d]``."""

    def cached_layer(
        self, k: int, h_BTD: Tensor, kv: LayerKV, self_mask: Tensor | None, memory_mask: Tensor | None
    ) -> Tensor:
        """Run layer ``k`` on a block of new positions with a cache."""

    def layer(
        self, k: int, h_BTD: Tensor, memory_BSD: Tensor, self_mask: Tensor | None, memory_mask: Tensor | None
    ) -> Tensor:
        """Run layer ``k`` on a whole sequence, from position 0 on, without a cache (training)."""

    def pieces(self, k: int) -> LayerPieces:
        """Return layer ``k`` cut at its attentions, for a runtime of graphs."""

    @property
    def norm_piece(self) -> nn.Module:
        """Return the final norm as a module: states ``[N, D]`` -> what the head reads, ``[N, D]``."""

    @property
    def head_piece(self) -> nn.Module:
        """Return the head as a module: normed states ``[N, D]`` -> logits ``[N, V]``."""

    def head_weights(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the head's matrix ``[V, D]`` and bias ``[V]`` or None, float32 arrays, shared where they can be."""

    def norm(self, h_BTD: Tensor) -> Tensor:
        """Apply the backbone's final norm (identity for post-norm layers)."""

    def head(self, h_BTD: Tensor) -> Tensor:
        """Return vocabulary logits ``[..., V]``."""

    def head_rows(self, ids_S: Tensor) -> Callable[[Tensor], Tensor]:
        """Gather some rows of the head; return what maps normed states to the logits of these tokens, ``[..., S]``."""


@dataclass(frozen=True)
class DecodeSettings:
    """Greedy decoding as the backbone's own generation config asks for it."""

    start_id: int
    end_ids: tuple[int, ...]
    pad_id: int
    max_new_tokens: int
    plain: Mapping[str, Any] = field(default_factory=dict)
    """The same and everything else that shapes the output, as plain values (kept in certificates)."""


def additive_mask(valid_BT: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return ``[B, 1, 1, T]``: 0 at valid tokens and the lowest number at padding; None if nothing is padded."""
    if valid_BT is None or (not torch.compiler.is_exporting() and bool(valid_BT.all())):
        return None  # a graph cannot tell, and always has its mask
    mask = torch.zeros(valid_BT.shape, dtype=dtype, device=valid_BT.device)
    return mask.masked_fill_(~valid_BT.bool(), torch.finfo(dtype).min)[:, None, None, :]


def causal_mask(
    first: int,
    last: int,
    dtype: torch.dtype,
    device: torch.device,
    bias_HN: Tensor | None = None,
    window: int | None = None,
) -> Tensor | None:
    """Return what self-attention adds to the scores of a block of new positions, or None if nothing.

    Args:
        first: of them.
        last: the one after them.
        dtype: of the scores.
        device: theirs.
        bias_HN: the decoder's ``distance_bias``.
        window: the layer's.

    Returns:
        ``[1, 1 or heads, last - first, last]``; None for a single position without a bias, all before it in its window.
    """
    sees = last if window is None else window
    if bias_HN is None and last - first == 1 and last <= sees:
        return None
    at = torch.arange(last, device=device)
    back_mT = at[first:, None] - at
    if bias_HN is None:
        mask_1mT = torch.zeros((1, *back_mT.shape), dtype=dtype, device=device)
    else:
        mask_1mT = bias_HN[:, back_mT.clamp(0, bias_HN.shape[1] - 1)].to(dtype)
    return mask_1mT.masked_fill((back_mT < 0) | (back_mT >= sees), torch.finfo(dtype).min)[None]
