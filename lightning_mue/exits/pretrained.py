"""from_pretrained: a model and its exits, as transformers' own ``save_pretrained`` wrote them."""

from __future__ import annotations

import os

from torch import nn

from lightning_mue.backbones import EXITS, build_backbone, exits_expected, read_weights
from lightning_mue.exits.exits_file import SCHEMA, unpack_exits


def from_pretrained(source: str | os.PathLike[str]) -> nn.Module:
    """Return a model with the exits that it had at ``model.save_pretrained(source)``, in float32, in train mode.

    transformers' own ``from_pretrained`` reads the same folder, without exits.

    Args:
        source: the folder, or a hub name.

    Raises:
        ValueError: it holds no exits, or others than its config names.
    """
    source = str(source)
    with exits_expected():
        model = build_backbone(source)
    config, weights = getattr(model.config, EXITS, None), read_weights(source, f"{EXITS}.")
    if config is None or not weights:
        raise ValueError(
            f"{source} holds no exits: it was saved without, or by an older version. Load it with transformers, and "
            "attach exits (`attach_exits`) or load them (`load_exits`)."
        )
    packed = {"schema": SCHEMA, "exits": config, "weights": weights}
    unpack_exits(model, packed, source)
    return model
