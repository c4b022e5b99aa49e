"""Exits as one file: config and weights, apart from the backbone's; safetensors, or a checkpoint that holds them."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from lightning_mue.exits.attach import Exits, attach_exits, attached, detach_exits
from lightning_mue.exits.config import ExitConfig
from lightning_mue.files import write_bytes

SCHEMA = 2
"""1: gates with a shortlist saw probabilities."""
HEADER = "lightning_mue_exits"
"""Entry of the file's metadata: schema and config as JSON."""


def save_exits(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the exits of ``model`` to a safetensors file; the same exits give the same bytes.

    Raises:
        ValueError: there are none.
    """
    packed = pack_exits(model)
    weights = {name: tensor.cpu().contiguous() for name, tensor in packed.pop("weights").items()}
    write_bytes(path, save(weights, metadata={HEADER: json.dumps(packed, sort_keys=True)}))


def load_exits(model: nn.Module, path: str | os.PathLike[str]) -> Exits:
    """Give ``model`` the exits of a file, attaching them if it has none; needs no Trainer.

    The backbone's own weights stay as they are: load those the exits were trained with.

    Args:
        model: a supported backbone.
        path: a file of ``save_exits``, or a Lightning checkpoint written while ``MultiExitSupervision`` trained.

    Raises:
        TypeError: the model has no view.
        ValueError: the file cannot be read or holds no exits, or they do not fit the model or those it has.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; name a file of `save_exits` or a Lightning checkpoint")
    packed = _from_checkpoint(path) if zipfile.is_zipfile(path) else _from_safetensors(path)
    return unpack_exits(model, packed, str(path))


def pack_exits(model: nn.Module) -> dict[str, Any]:
    """Return the exits of ``model`` as plain values and tensors.

    Raises:
        ValueError: there are none.
    """
    exits = attached(model)
    if exits is None:
        raise ValueError("No exits are attached, so there are none to save; call `attach_exits(model, config)`.")
    return {"schema": SCHEMA, "exits": exits.config.to_dict(), "weights": dict(exits.state_dict())}


def unpack_exits(model: nn.Module, packed: Any, source: str) -> Exits:
    """Give ``model`` the exits of ``pack_exits``, attaching them if it has none; ``source`` names them in errors.

    Raises:
        ValueError: not packed exits, or they do not fit the model or those it has.
    """
    if not is_packed(packed) or packed["schema"] != SCHEMA:
        raise ValueError(f"{source} must hold exits of schema {SCHEMA}; save them again.")
    config, exits = ExitConfig.of(packed["exits"]), attached(model)
    if is_new := exits is None:
        # The random weights of new exits are all overwritten; the caller's random numbers stay as they were.
        with torch.random.fork_rng(devices=[]):
            exits = attach_exits(model, config)
    check_same(config, exits, source)
    try:
        exits.load_state_dict(packed["weights"])
    except RuntimeError as error:
        if is_new:
            detach_exits(model)
        raise ValueError(f"{source} holds exits that do not fit {type(model).__name__}: {error}") from error
    return exits


def is_packed(packed: Any) -> bool:
    """Say whether this is what ``pack_exits`` returns, of whatever schema."""
    return isinstance(packed, dict) and packed.keys() == {"schema", "exits", "weights"}


def check_same(config: ExitConfig, exits: Exits, source: str) -> None:
    """Compare a config with the exits that are attached.

    Raises:
        ValueError: they differ.
    """
    wanted, found = config.to_dict(), exits.config.to_dict()
    if differing := {name: (value, found[name]) for name, value in wanted.items() if value != found[name]}:
        words = "; ".join(f"`{name}` is {theirs} there and {mine} here" for name, (theirs, mine) in differing.items())
        raise ValueError(
            f"Exits are attached that are not those of {source}: {words}. Use the same, or call "
            "`detach_exits(model)` first."
        )


def _from_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, "pt") as file:
            header = (file.metadata() or {}).get(HEADER)
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} must be a file of `save_exits` or a Lightning checkpoint; {error}") from error
    if header is None:
        raise ValueError(f"{path} holds weights, but no exits written by `save_exits`.")
    return json.loads(header) | {"weights": weights}


def _from_checkpoint(path: Path) -> dict[str, Any]:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # truncated, foreign, or more than plain values: torch raises what it stumbles over
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} cannot be read as a Lightning checkpoint of plain values: {reason}") from error
    states = checkpoint.get("callbacks", {}) if isinstance(checkpoint, dict) else {}
    found = {name: state for name, state in states.items() if is_packed(state)}
    if len(found) != 1:
        raise ValueError(
            f"{path} must hold the exits of one MultiExitSupervision, found {sorted(found) or 'none'} among its "
            f"callbacks {sorted(states)}."
        )
    return next(iter(found.values()))
