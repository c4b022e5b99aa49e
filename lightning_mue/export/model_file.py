"""A model as two files: its config, from which an equal model is built, and its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_mue.backbones import backbone_config, build_backbone, fingerprint
from lightning_mue.exits import attach_exits, attached

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
SCHEMA = 2


def check_own_weights(model: nn.Module) -> None:
    """Refuse a model that its config would not build again.

    Raises:
        ValueError: PEFT's adapters are in its layers, or its weights are tensors of another library.
    """
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ValueError(
            "PEFT's adapters are in the model's layers, and a bundle has none: `model.merge_and_unload()` gives a "
            "plain model; calibrate and freeze that."
        )
    if foreign := sorted({type(t).__name__ for t in model.state_dict().values() if hasattr(t, "__tensor_flatten__")}):
        raise ValueError(
            f"Some weights are of type {foreign}; a bundle holds plain ones. Freeze the model as it was before, and "
            "let the policy have a lower precision (`lower_precision` of CalibrateExits)."
        )


def save_files(model: nn.Module, folder: Path, found: str) -> None:
    """Write ``model`` into ``folder``; tied weights are stored once.

    Args:
        model: a supported backbone, with or without exits.
        folder: an existing folder.
        found: the fingerprint of the model's weights.
    """
    exits = attached(model)
    config = {
        "schema": SCHEMA,
        "fingerprint": found,
        "backbone": backbone_config(model),
        "exits": None if exits is None else exits.config.to_dict(),
    }
    text = json.dumps(config, indent=1, sort_keys=True, allow_nan=False) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
    # One entry of metadata: with the names of tied weights in it, as `save_model` does, the order of bytes is random.
    save_file(_distinct(model), folder / WEIGHTS, metadata={"format": "pt"})


def read_config(folder: Path) -> dict[str, Any]:
    """Read a bundle's config.

    Raises:
        ValueError: not JSON, another schema, or an entry is missing.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG} is not JSON ({error}); copy the bundle again.") from error
    if not isinstance(config, dict) or config.get("schema") != SCHEMA:
        raise ValueError(f"{folder / CONFIG} must be a bundle's config of schema {SCHEMA}; freeze the model again.")
    if missing := {"fingerprint", "backbone", "exits"} - set(config):
        raise ValueError(f"{folder / CONFIG} lacks {sorted(missing)}; freeze the model again.")
    return config


def load_files(folder: Path, config: dict[str, Any]) -> nn.Module:
    """Build the model of ``config`` and read its weights.

    Raises:
        ValueError: the weights are damaged, or are not those of the config's fingerprint.
    """
    # The random weights of the new model are all overwritten; the caller's random numbers stay as they were.
    with torch.random.fork_rng(devices=[]):
        model = build_backbone(config["backbone"])
        if config["exits"] is not None:
            attach_exits(model, config["exits"])
    _read_weights(model, folder / WEIGHTS)
    if (found := fingerprint(model)) != config["fingerprint"]:
        raise ValueError(
            f"{folder} mixes files of different bundles: {CONFIG} is of the model {config['fingerprint']}, "
            f"{WEIGHTS} is of another model ({found}). Copy the bundle again."
        )
    return model.eval()


def _distinct(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights by name; of names that share one tensor only the first."""
    by_place: dict[object, str] = {}
    state = model.state_dict()
    for name, tensor in sorted(state.items()):
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else name
        by_place.setdefault(place, name)
    return {name: state[name].detach().cpu().contiguous() for name in by_place.values()}


def _read_weights(model: nn.Module, path: Path) -> None:
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}); copy the bundle again.") from error
    own = model.state_dict(keep_vars=True)
    unexpected = sorted(set(weights) - set(own))
    wrong = [name for name, tensor in weights.items() if name in own and own[name].shape != tensor.shape]
    if unexpected or wrong:
        raise ValueError(f"{path} is of another model: {CONFIG} has no {(unexpected + wrong)[0]!r} of that shape.")
    for name, tensor in weights.items():
        own[name].data = own[name].data.to(tensor.dtype)  # each tensor keeps the type it was stored in
    # Of tied weights one name is stored, so some may be missing here; the fingerprint tells if too many were.
    model.load_state_dict(weights, strict=False)
