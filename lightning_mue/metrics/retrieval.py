"""Retrieval: how often a picture's text, or a text's picture, is among the first."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

RANKS = (1, 5, 10)


class Retrieval(Metric):
    """Recall at 1, 5 and 10 in both directions, over all pairs that were seen.

    Pictures are compared with all texts. A text that is the same as a picture's own counts as its own.
    """

    full_state_update = False
    image: list[Tensor]
    text: list[Tensor]
    text_id: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("image", "text", "text_id"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, image_BE: Tensor, text_BE: Tensor, text_id_B: Tensor) -> None:
        """Add pairs.

        Args:
            image_BE: unit vectors of pictures.
            text_BE: unit vectors of their texts.
            text_id_B: numbers; equal texts have equal ones.
        """
        self.image.append(image_BE.float())
        self.text.append(text_BE.float())
        self.text_id.append(text_id_B)

    def compute(self) -> dict[str, Tensor]:
        """Return ``image_to_text_R@1`` and so on."""
        image_NE, text_NE, id_N = (_joined(part) for part in (self.image, self.text, self.text_id))
        same_NN, scores_NN = id_N[:, None] == id_N[None], image_NE @ text_NE.T
        found: dict[str, Tensor] = {}
        for way, scores in (("image_to_text", scores_NN), ("text_to_image", scores_NN.T)):
            found |= {f"{way}_R@{k}": recall(scores, same_NN, k).mean() for k in RANKS}
        return found


def recall(scores_NM: Tensor, right_NM: Tensor, k: int) -> Tensor:
    """Return ``[N]``: 1 where one of the ``k`` best scored is right, else 0."""
    best_Nk = scores_NM.topk(min(k, scores_NM.shape[1])).indices
    return right_NM.gather(1, best_Nk).any(1).float()


def _joined(parts: list[Tensor] | Tensor) -> Tensor:
    return parts if isinstance(parts, Tensor) else torch.cat(parts)
