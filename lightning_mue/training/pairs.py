"""Pairs: how well pictures and their texts find each other in validation, after every exit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mue.backbones import Backbone
from lightning_mue.backbones.contrastive import text_ids
from lightning_mue.exits import Exits
from lightning_mue.metrics.retrieval import Retrieval
from lightning_mue.training.contrast import text_embeddings, text_states
from lightning_mue.training.supervised import Supervised
from lightning_mue.training.supervision import Supervision

FULL_DEPTH = "full_depth"


def check_contrast(supervision: Supervision, backbone: Backbone, exits: Exits) -> None:
    """Look whether what is to be compared can be, and whether what can be left learns.

    Raises:
        ValueError: which setting does not fit.
    """
    contrastive = backbone.contrastive
    if supervision.contrast and contrastive is None:
        raise ValueError("`contrast` is for backbones that compare pictures with texts (CoCa); set it to 0.")
    if contrastive is not None and not supervision.contrast and contrastive.text.name in exits.layers:
        raise ValueError("Exits of `text` learn from the contrastive loss alone; give `contrast` a weight (CoCa: 0.5).")


class Pairs(nn.ModuleDict):
    """A `Retrieval` for each exit of either stream, the other at full depth, and for both at full depth.

    Args:
        backbone: whose pictures and texts are compared.
        exits: its exits.
    """

    def __init__(self, backbone: Backbone, exits: Exits) -> None:
        assert backbone.contrastive is not None
        streams = (backbone.contrastive.image.name, backbone.contrastive.text.name)
        names = [FULL_DEPTH, *(f"{name}_{k}" for name in streams for k in exits.layers.get(name, ()))]
        super().__init__({name: Retrieval() for name in names})

    def see(
        self, backbone: Backbone, exits: Exits, found: Mapping[str, Supervised], labels_BT: Tensor, start_id: int
    ) -> None:
        """Add a batch.

        Args:
            backbone: as above.
            exits: as above.
            found: ``vision_2/`` and the like -> a pass whose pictures left there; "" where they went full depth.
            labels_BT: the texts, -100 at padding.
            start_id: the token before them.
        """
        contrastive = backbone.contrastive
        assert contrastive is not None
        text_BT = text_ids(labels_BT, start_id, contrastive)
        number_B = torch.tensor([hash(tuple(row)) for row in text_BT.tolist()], device=labels_BT.device)
        states = text_states(contrastive, exits, text_BT)
        *early, (_, last_BE) = text_embeddings(contrastive, exits, states).items()
        for name, passed in found.items():
            if (at := name.rstrip("/") or FULL_DEPTH) in self:
                image_BE = contrastive.image_embedding(passed.left[contrastive.image.name])
                self._of(at).update(image_BE, last_BE, number_B)
                for k, text_BE in early if at == FULL_DEPTH else ():
                    self._of(f"{contrastive.text.name}_{k}").update(image_BE, text_BE, number_B)

    def results(self) -> dict[str, Tensor]:
        """Return name -> recall of all that was seen, ``image_to_text_R@1`` at full depth, and forget it."""
        found: dict[str, Tensor] = {}
        for name in self:
            at = "" if name == FULL_DEPTH else f"{name}/"
            found |= {f"{at}{what}": value for what, value in self._of(name).compute().items()}
            self._of(name).reset()
        return found

    def _of(self, name: str) -> Any:
        return self[name]
