"""What a model was called with in a training step, as deep supervision reads it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_mue.backbones import Backbone
from lightning_mue.backbones.contrastive import labels_of
from lightning_mue.callbacks.batches import missing_inputs
from lightning_mue.prompt import IGNORE
from lightning_mue.training.supervised import shift_right


def computes_loss(model: Any) -> bool:
    """Whether a model has a ``loss`` of its own, as transformers' have; open_clip's CoCa leaves that to its project."""
    return "labels" in inspect.signature(model.forward).parameters


def check_gives_loss(model: Any, backbone: Backbone) -> None:
    """Refuse a model whose training nobody could know.

    Raises:
        ValueError: it has no loss of its own, and is not one that open_clip's loss is for.
    """
    if not computes_loss(model) and backbone.contrastive is None:
        raise ValueError(
            f"The `forward` of {type(model).__name__} takes no `labels` and returns no `loss`; train it by "
            "`lightning_mue.MultiExitModule`, or give it both."
        )


def check_compiled(pl_module: L.LightningModule, path: str) -> None:
    """Refuse one graph of what trains through layers, one exit after the other.

    Raises:
        ValueError: the project or its model is compiled with ``fullgraph=True``.
    """
    of_project = (getattr(pl_module, "_compiler_ctx", None) or {}).get("dynamo_ctx")
    of_model = getattr(pl_module.get_submodule(path), "dynamo_ctx", None)
    if any(getattr(context, "fullgraph", False) for context in (of_project, of_model)):
        raise ValueError(
            f"`torch.compile(..., fullgraph=True)` makes one graph of a step, and exits of {path!r} are trained beside "
            "what is compiled; leave `fullgraph` out, or compile each layer (`layer.compile()`)."
        )


def read_call(model: Any, backbone: Backbone, given: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """Return the backbone's inputs and the labels of a call, under our own names.

    Args:
        model: what was called.
        backbone: its streams.
        given: arguments by name: a model's with a loss of its own, or ``image`` and ``text`` of open_clip's CoCa.

    Raises:
        ValueError: labels or an input are missing, or an argument would be passed over.
    """
    if given.get("decoder_prompt") is not None:
        rank_zero_warn(
            "`decoder_prompt`: training and our engine give it to the decoder, the model's own forward outside of "
            "`training_step` passes it over."
        )
    given = backbone.read_call(given) if computes_loss(model) else _pairs(backbone, given)
    given = _without_shifted(backbone, given)
    _check(model, backbone.generate_inputs, given)
    inputs = {name: given[name] for name in backbone.generate_inputs if given.get(name) is not None}
    return inputs, given["labels"]


def _pairs(backbone: Backbone, given: Mapping[str, Any]) -> dict[str, Any]:
    present = [name for name, value in given.items() if value is not None]
    if missing := [name for name in ("image", "text") if name not in present]:
        raise ValueError(f"Deep supervision needs {missing}; the model was called with {present}.")
    assert backbone.contrastive is not None
    labels_BT = labels_of(given["text"], backbone.decode_settings(None).start_id, backbone.contrastive)
    others = {name: value for name, value in given.items() if name not in ("image", "text")}
    return others | {"pixel_values": given["image"], "labels": labels_BT}


def _without_shifted(backbone: Backbone, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Leave out decoder inputs that are what the labels make: a project that reads logits may give both."""
    ids_BT, labels_BT = given.get("decoder_input_ids"), given.get("labels")
    if ids_BT is None or labels_BT is None or ids_BT.shape != labels_BT.shape:
        return given
    settings, counts_BT = backbone.decode_settings(None), labels_BT != IGNORE
    if not torch.equal(shift_right(labels_BT, settings.start_id, settings.pad_id)[counts_BT], ids_BT[counts_BT]):
        return given
    return {name: value for name, value in given.items() if name not in ("decoder_input_ids", "decoder_attention_mask")}


def _check(model: Any, wanted: tuple[str, ...], given: Mapping[str, Any]) -> None:
    present = [name for name, value in given.items() if value is not None]
    if "labels" not in present:
        raise ValueError(f"Deep supervision needs `labels`; the model was called with {present}.")
    if missing := missing_inputs(wanted, present):
        raise ValueError(f"Deep supervision needs {missing}; the model was called with {present}.")
    known = inspect.signature(model.forward).parameters.keys() - {*wanted, "labels"}
    if passed_over := [name for name in present if name in known and not isinstance(given[name], (bool, int))]:
        raise ValueError(
            f"Deep supervision makes the decoder's inputs of `labels` and would pass over {passed_over}; leave it out. "
            "What the decoder reads before the answer is its `decoder_prompt`."
        )
