"""What an import leaves beside its shards: ``<split>.import.json`` for going on, ``index.json`` for readers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_mue.files import write_text

GENERATOR = "lightning_mue.importers/1"


def begin(folder: Path, name: str, split: str, arguments: Mapping[str, Any], overwrite: bool) -> None:
    """Open a folder for the shards of a split: a new one, or one in which the same import stopped.

    Args:
        folder: where the shards go; made when missing.
        name: of the data set.
        split: of the shards.
        arguments: all that the shards depend on, as plain values.
        overwrite: delete what another import of this split wrote, and start over.

    Raises:
        FileExistsError: the folder holds other data.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _check_owner(folder, name, split)
    path = _path(folder, split)
    if path.exists():
        found = _read(path)["arguments"]
        changed = [key for key in {**found, **arguments} if found.get(key) != arguments.get(key)]
        if changed and not overwrite:
            there = ", ".join(f"{key} {_short(found.get(key))}, now {_short(arguments.get(key))}" for key in changed)
            raise FileExistsError(
                f"{folder} holds the {split} split of another import ({there}): give the same settings to go on, name "
                "another folder with --out, or start over with --overwrite"
            )
    if overwrite:
        path.unlink(missing_ok=True)
        _write_index(folder, name)
    # A killed run leaves the shard that it was writing under a name with a dot.
    for stale in [*folder.glob(f".{split}-*.tar.*"), *(folder.glob(f"{split}-*.tar") if overwrite else ())]:
        stale.unlink()
    if not path.exists():
        _write(folder, name, split, {"arguments": dict(arguments)})


def finish(folder: Path, name: str, split: str, arguments: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """Note what became of an import, and bring ``index.json`` up to date."""
    _write(folder, name, split, {"arguments": dict(arguments), "result": dict(result)})
    _write_index(folder, name)


def _check_owner(folder: Path, name: str, split: str) -> None:
    index = _read(folder / "index.json") if (folder / "index.json").exists() else None
    states = [_read(path) for path in sorted(folder.glob("*.import.json"))]
    owners = {state.get("name") for state in states} | ({index.get("name")} if index else set())
    if index and index.get("generator") != GENERATOR:
        raise FileExistsError(f"{folder} holds data that no importer wrote (see index.json): name another folder")
    if owners - {name}:
        raise FileExistsError(f"{folder} holds {', '.join(sorted(map(str, owners - {name})))}: name another folder")
    if any(folder.glob(f"{split}-*.tar")) and not _path(folder, split).exists():
        raise FileExistsError(f"{folder} holds {split}-*.tar that no importer wrote: name another folder")


def _write_index(folder: Path, name: str) -> None:
    splits = {}
    for path in sorted(folder.glob("*.import.json")):
        state = _read(path)
        if "result" in state:
            splits[state["split"]] = state["result"] | {"arguments": state["arguments"]}
    write_text(folder / "index.json", json.dumps({"name": name, "generator": GENERATOR, "splits": splits}, indent=1))


def _write(folder: Path, name: str, split: str, state: Mapping[str, Any]) -> None:
    whole = {"name": name, "generator": GENERATOR, "split": split, **state}
    write_text(_path(folder, split), json.dumps(whole, indent=1))


def _read(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise FileExistsError(f"{path} is broken JSON, so whose data lies there is not known: {error}") from error
    if not isinstance(state, dict):
        raise FileExistsError(f"{path} is not an object, so whose data lies there is not known")
    return state


def _path(folder: Path, split: str) -> Path:
    return folder / f"{split}.import.json"


def _short(value: object) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) > 12 else str(value)
