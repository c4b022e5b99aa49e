"""Options of a backbone's config that lie deeper than one level, such as ``--model.backbone.text_config.dropout 0.2``.

jsonargparse merges one level of a free mapping; of a deeper one the rest would be gone, and the model silently another.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import get_loader

PREFIX = "--model.backbone."


def whole_parts(args: Sequence[str]) -> list[str]:
    """Return the arguments with each deep option as the whole part of the backbone's config that it changes.

    Raises:
        ValueError: an option has no value, or lies in what is no mapping.
    """
    found, changed, config = list[str](), dict[str, Any](), dict[str, Any]()
    rest = iter(args)
    for arg in rest:
        name, given, value = arg.partition("=")
        if not given and (name in ("-c", "--config") or name.startswith(PREFIX)):
            following = next(rest, None)
            if following is None:
                raise ValueError(f"{name} needs a value")
            value = following
        if name in ("-c", "--config"):
            found += [name, value]
            config |= _backbone(value)
        elif _is_deep(name):
            part, *path = name.removeprefix(PREFIX).split(".")
            changed[part] = _with(changed.get(part, config.get(part, {})), path, _read(value), name)
        elif name.startswith(PREFIX):
            found += [name, value]
            config[name.removeprefix(PREFIX)] = _read(value)
        else:
            found.append(arg)
    return found + [text for part, value in changed.items() for text in (f"{PREFIX}{part}", json.dumps(value))]


def _read(text: str) -> Any:
    return get_loader("yaml")(text)  # as jsonargparse reads it, to which 1e-3 is a number


def _is_deep(name: str) -> bool:
    return name.startswith(PREFIX) and "." in name.removeprefix(PREFIX)


def _backbone(path: str) -> dict[str, Any]:
    """Return the backbone's config of a recipe; nothing where it has none, or is no file."""
    if not Path(path).is_file():
        return {}
    recipe = _read(Path(path).read_text(encoding="utf-8"))
    model = recipe.get("model") if isinstance(recipe, Mapping) else None
    backbone = model.get("backbone") if isinstance(model, Mapping) else None
    return dict(backbone) if isinstance(backbone, Mapping) else {}


def _with(part: Any, path: Sequence[str], value: Any, name: str) -> Any:
    """Return a part of a config with one value changed."""
    if not path:
        return value
    if not isinstance(part, Mapping):
        raise ValueError(f"{name} lies in {part!r}, which is no mapping")
    return {**part, path[0]: _with(part.get(path[0], {}), path[1:], value, name)}
