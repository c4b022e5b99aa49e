"""What the rest of the package sees of a model that compares pictures with texts.

Shapes: ``B`` pictures or texts, ``C`` other texts, ``T`` tokens of a text, ``E`` width of embeddings.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from lightning_mue.backbones.stream import EncoderStream, StreamState
from lightning_mue.prompt import IGNORE


class Contrastive(Protocol):
    """Pictures and texts in one space: a stream of each, and embeddings of the states with which they left."""

    @property
    def image(self) -> EncoderStream:
        """The stream of pictures; one of the backbone's encoders."""

    @property
    def text(self) -> EncoderStream:
        """The stream of texts; reads ``text_ids [B, T]``."""

    @property
    def pad_id(self) -> int:
        """The padding of texts."""

    @property
    def longest(self) -> int:
        """Tokens of a text at most, start and end included."""

    def image_embedding(self, state: StreamState) -> Tensor:
        """Return unit vectors ``[B, E]`` of pictures that left with these states."""

    def text_embedding(self, state: StreamState) -> Tensor:
        """Return unit vectors ``[B, E]`` of texts that left with these states."""

    def logits(self, image_BE: Tensor, text_CE: Tensor) -> Tensor:
        """Return how alike pictures and texts are, ``[B, C]``, at the model's temperature."""


def text_ids(labels_BT: Tensor, start_id: int, contrastive: Contrastive) -> Tensor:
    """Return whole texts as the text stream reads them: all of one length, ``[B, longest]``.

    What stands after a text has its place by that length, so an embedding would change with the padding.

    Args:
        labels_BT: tokens, ended by the end token, -100 at padding.
        start_id: the token before them.
        contrastive: whose texts they are.

    Raises:
        ValueError: a text is too long.
    """
    longest, (rows, length) = contrastive.longest, labels_BT.shape
    if 1 + length > longest:
        raise ValueError(f"Texts have at most {longest} tokens, start and end included, got {1 + length}")
    text_BT = labels_BT.new_full((rows, longest), contrastive.pad_id)
    text_BT[:, 0] = start_id
    text_BT[:, 1 : 1 + length] = labels_BT.masked_fill(labels_BT < 0, contrastive.pad_id)
    return text_BT


def labels_of(text_BT: Tensor, start_id: int, contrastive: Contrastive) -> Tensor:
    """Return the labels ``[B, longest - 1]`` of whole texts, -100 at padding: those of which ``text_ids`` makes them.

    Args:
        text_BT: as open_clip's tokenizer writes them, ``[B, longest]``.
        start_id: their first token.
        contrastive: whose texts they are.

    Raises:
        ValueError: they have another length, or begin otherwise.
    """
    if text_BT.shape[1] != contrastive.longest:
        raise ValueError(f"`text` must be padded to the model's {contrastive.longest} tokens, got {text_BT.shape[1]}")
    if (text_BT[:, 0] != start_id).any():
        raise ValueError(
            f"`text` must begin with the start token, {start_id} for open_clip's tokenizer, got "
            f"{text_BT[:, 0].unique().tolist()}; for others say so in the `generation_config` of `mue`'s own CoCa model"
        )
    labels_BT = text_BT[:, 1:]
    return labels_BT.masked_fill(labels_BT == contrastive.pad_id, IGNORE)
