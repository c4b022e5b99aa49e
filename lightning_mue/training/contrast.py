"""The contrastive loss: pictures and texts of a batch find each other, whichever layer they leave after.

Shapes: ``B`` pairs of a batch, of all processes together; ``E`` width of embeddings; ``T`` tokens of a text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.nn.functional import all_gather
from torch.nn.functional import cross_entropy

from lightning_mue.backbones import StreamState
from lightning_mue.backbones.contrastive import Contrastive, text_ids
from lightning_mue.exits import Exits


@dataclass(frozen=True)
class Paired:
    """The pictures and texts of a batch, in one space.

    Args:
        image_BE: unit vectors of pictures.
        text_BT: the texts, as the model reads them.
        states: layer of the text stream (its exits and the last) -> states after it.
        text_BE: layer -> unit vectors of texts that leave there.
    """

    image_BE: Tensor
    text_BT: Tensor
    states: Mapping[int, StreamState]
    text_BE: Mapping[int, Tensor]


def pair(contrastive: Contrastive, exits: Exits, left: StreamState, labels_BT: Tensor, start_id: int) -> Paired:
    """Embed a batch.

    Args:
        contrastive: the backbone's.
        exits: its exits.
        left: the states with which pictures left.
        labels_BT: tokens of their texts, ended by the end token, -100 at padding.
        start_id: the token before them.
    """
    text_BT = text_ids(labels_BT, start_id, contrastive)
    states = text_states(contrastive, exits, text_BT)
    return Paired(contrastive.image_embedding(left), text_BT, states, text_embeddings(contrastive, exits, states))


def contrast(contrastive: Contrastive, paired: Paired) -> dict[int, Tensor]:
    """Return layer of the text stream (its exits and the last) -> contrastive loss."""
    same_BB, image_BE = equal_rows(gathered_texts(paired.text_BT)), gathered(paired.image_BE)
    return {
        k: info_nce(contrastive.logits(image_BE, gathered(text_BE)), same_BB) for k, text_BE in paired.text_BE.items()
    }


def text_states(contrastive: Contrastive, exits: Exits, text_BT: Tensor) -> dict[int, StreamState]:
    """Return layer (the exits of the text stream and its last) -> the states after it."""
    stream = contrastive.text
    state = stream.prologue({"text_ids": text_BT}, {})
    found = {}
    for k in range(1, stream.num_layers + 1):
        state = state.at(stream.layer(k, state))
        if k in exits.layers.get(stream.name, ()) or k == stream.num_layers:
            found[k] = state
    return found


def text_embeddings(contrastive: Contrastive, exits: Exits, states: Mapping[int, StreamState]) -> dict[int, Tensor]:
    """Return layer -> embeddings ``[B, E]`` of the texts that leave there with these states."""
    name = contrastive.text.name
    return {k: contrastive.text_embedding(state.at(exits.adapt(name, k, state.h_BTD))) for k, state in states.items()}


def info_nce(logits_BB: Tensor, same_BB: Tensor) -> Tensor:
    """Return the mean over both directions of finding one's own counterpart (CoCa, equation 2).

    Args:
        logits_BB: pictures by texts.
        same_BB: True where two texts are one and the same; such a pair is no negative, and is left out.
    """
    own_B = torch.arange(len(logits_BB), device=logits_BB.device)
    others = same_BB & ~torch.eye(len(same_BB), dtype=torch.bool, device=same_BB.device)
    logits_BB = logits_BB.float().masked_fill(others, -torch.inf)
    return (cross_entropy(logits_BB, own_B) + cross_entropy(logits_BB.T, own_B)) / 2


def equal_rows(ids_BT: Tensor) -> Tensor:
    """Return which texts are the same, ``[B, B]``."""
    return (ids_BT[:, None] == ids_BT[None]).all(-1)


def gathered(x_BE: Tensor) -> Tensor:
    """Return the rows of all processes, this one's with their gradient and the others' too."""
    return _joined(x_BE, all_gather) if _processes() > 1 else x_BE


def gathered_texts(ids_BT: Tensor) -> Tensor:
    """Return the texts of all processes.

    Raises:
        ValueError: they have batches of different sizes.
    """
    if _processes() == 1:
        return ids_BT
    sizes = torch.cat(_all_gather(torch.tensor([len(ids_BT)], device=ids_BT.device))).tolist()
    if len({*sizes}) > 1:
        raise ValueError(f"The contrastive loss needs batches of one size on all ranks, got {sizes}; drop small ones.")
    return _joined(ids_BT, _all_gather)


def _processes() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def _joined(x: Tensor, gather: Callable[[Tensor], object]) -> Tensor:
    found: Tensor = torch.cat(list(gather(x.contiguous())))  # type: ignore[call-overload]
    return found


def _all_gather(x: Tensor) -> list[Tensor]:
    found = [torch.empty_like(x) for _ in range(_processes())]
    torch.distributed.all_gather(found, x)
    return found
