"""The manifest of a bundle: every file with its size and sha256, so that damage is named before anything is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FORMAT = "lightning_mue bundle"
SCHEMA = 1
MANIFEST = "manifest.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")
"""Endings of files that may hold a pickle, and so run code when they are read."""


def write_manifest(folder: Path) -> None:
    """Write the manifest of the files that lie in ``folder`` now."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in _visible(folder)
    }
    (folder / MANIFEST).write_text(_as_text(files), encoding="utf-8")


def bundle_size(folder: Path) -> tuple[int, int]:
    """Return the bytes of a bundle's weights and graphs, and of all else in it."""
    sizes = {name: entry["bytes"] for name, entry in _listed_files(folder).items()}
    weights = sum(size for name, size in sizes.items() if name.endswith((".safetensors", ".onnx")))
    return weights, sum(sizes.values()) + (folder / MANIFEST).stat().st_size - weights


def is_bundle(folder: Path) -> bool:
    """Whether ``folder`` claims to be a bundle; it may still be damaged."""
    try:
        return _parse(folder).get("format") == FORMAT
    except ValueError:
        return False


def foreign_files(folder: Path) -> list[str]:
    """Return what lies in a bundle's folder and is not of the bundle, hidden files included."""
    listed = set(_parse(folder).get("files", ())) | {MANIFEST}
    names = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if not path.is_dir())
    return [name for name in names if name not in listed]


def check_manifest(folder: Path) -> None:
    """Compare every file of a bundle with its manifest.

    Hidden files (such as ``.git``) are never read by ``load`` and so are let be.

    Raises:
        ValueError: no bundle, another schema, or a file that is missing, damaged, unlisted or may hold a pickle.
    """
    listed = _listed_files(folder)
    for path in _visible(folder):
        name = path.relative_to(folder).as_posix()
        if path.suffix.lower() in PICKLES:
            raise ValueError(f"{folder} holds {name!r}, which may be a pickle; bundles never do. Remove it.")
        if name not in listed:
            raise ValueError(f"{folder} holds {name!r}, which its {MANIFEST} does not list. Remove it.")
    for name, entry in listed.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{folder} lacks {name!r}, which its {MANIFEST} lists; copy the bundle again.")
        if (size := path.stat().st_size) != entry["bytes"]:
            what = "truncated" if size < entry["bytes"] else "changed"
            raise ValueError(
                f"{name!r} of {folder} is {what}: its {MANIFEST} says {entry['bytes']} bytes, found {size}; "
                "copy the bundle again."
            )
        if _sha256(path) != entry["sha256"]:
            raise ValueError(f"{name!r} of {folder} is damaged or was changed (other sha256); copy the bundle again.")


def _listed_files(folder: Path) -> Mapping[str, Mapping[str, Any]]:
    """Return name -> size and hash, after checking the manifest itself."""
    data = _parse(folder)
    if data.get("format") != FORMAT:
        raise ValueError(f"{folder / MANIFEST} is not of a {FORMAT}; `lightning_mue.freeze` writes one.")
    if data.get("schema") != SCHEMA:
        raise ValueError(
            f"{folder} is a bundle of schema {data.get('schema')!r}, this version of lightning_mue reads {SCHEMA}; "
            "freeze it again or install the version that wrote it."
        )
    files = data.get("files")
    if not isinstance(files, dict) or _as_text(files) != (folder / MANIFEST).read_text(encoding="utf-8"):
        raise ValueError(f"{MANIFEST!r} of {folder} is damaged or was changed by hand; copy the bundle again.")
    outside = [name for name in files if Path(name).is_absolute() or ".." in Path(name).parts]
    if outside:
        raise ValueError(f"{MANIFEST!r} of {folder} names {outside[0]!r}, which lies outside the bundle.")
    return files


def _parse(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} is not a bundle: it has no {MANIFEST}. `lightning_mue.freeze` writes one.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also bytes that are no text
        raise ValueError(f"{MANIFEST!r} of {folder} is damaged ({error}); copy the bundle again.") from error
    if not isinstance(data, dict):
        raise ValueError(f"{MANIFEST!r} of {folder} is damaged: it holds {type(data).__name__}, not an object.")
    return data


def _as_text(files: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the manifest; its digest is over the list, so that a changed byte of the manifest itself is seen too."""
    listed = json.dumps(files, sort_keys=True)
    data = {"format": FORMAT, "schema": SCHEMA, "digest": hashlib.sha256(listed.encode()).hexdigest(), "files": files}
    return json.dumps(data, indent=1, sort_keys=True) + "\n"


def _visible(folder: Path) -> list[Path]:
    """Return all files but the manifest and those that are hidden or lie in hidden folders."""
    paths = (path for path in sorted(folder.rglob("*")) if not path.is_dir())
    return [
        path
        for path in paths
        if path != folder / MANIFEST and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
