"""Annotation files: found in a folder, read, hashed, and told apart by what they hold."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

CAPTIONS = "COCO captions"
KARPATHY = "a Karpathy split (dataset_coco.json and the like)"
QUESTIONS = "VQA questions"
ANSWERS = "VQA annotations"
DOCUMENTS = "DocVQA questions"
PAIRS = "SNLI-VE pairs"
NUMBERED = "captions by line (NAME.jpg#0, a tab, the caption)"
TABLE = "a table of captions (image,caption)"
NAMES = "a list of picture names"


def find_annotations(given: Sequence[str | Path], sets: Sequence[tuple[str, ...]]) -> list[Path]:
    """Return the annotation files.

    Args:
        given: the files themselves, or one folder that holds them under their official names.
        sets: the official names, as sets of files that belong together; a set within another one gives way to it.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: the folder holds more than one set.
    """
    paths = [Path(path).expanduser() for path in given]
    if len(paths) != 1 or not paths[0].is_dir():
        for path in paths:
            if not path.is_file():
                raise FileNotFoundError(f"no annotations: {path} is not a file (one folder may be given, or files)")
        return paths
    folder = paths[0]
    whole = [names for names in sets if all((folder / name).is_file() for name in names)]
    found = [names for names in whole if not any(set(names) < set(other) for other in whole)]
    if not found:
        wanted = ", or ".join(" with ".join(names) for names in sets)
        raise FileNotFoundError(f"no annotations: {folder} holds no {wanted}; name the files themselves")
    if len(found) > 1:
        several = " and ".join(" with ".join(names) for names in found)
        raise ValueError(f"{folder} holds {several}: name the files that are meant")
    return [folder / name for name in found[0]]


def read_annotations(path: Path) -> Any:
    """Return JSON as it is, JSON lines as a list, and any other text as a list of its lines.

    Raises:
        ValueError: the file is no text, or begins like JSON and is none.
    """
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be annotations, and it is no text; an archive must be unpacked first") from error
    lines = [line.rstrip("\r") for line in text.split("\n") if line.strip()]
    if not text.lstrip().startswith(("{", "[")):
        return lines
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        try:
            return [json.loads(line) for line in lines]
        except json.JSONDecodeError:
            raise ValueError(f"{path} begins like JSON and is broken: {error}; download it again") from error


def hash_of(paths: Sequence[Path]) -> str:
    """Return a SHA-256 over the contents of files, whatever their names and order."""
    digests = []
    for path in paths:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()


def by_kind(files: Mapping[str, Any], kinds: Sequence[str], needs: str) -> dict[str, Any]:
    """Return kind -> content.

    Args:
        files: name -> content, as ``read_annotations`` gave it.
        kinds: those that may be there.
        needs: what is asked for, in words.

    Raises:
        ValueError: a file holds something else, or two of them the same.
    """
    found: dict[str, Any] = {}
    for name, content in files.items():
        kind = kind_of(content)
        if kind not in kinds:
            raise ValueError(f"{name} holds {kind}; needed is {needs}: name the right file with --annotations")
        if kind in found:
            raise ValueError(f"{name} holds {kind}, and so does another file; needed is {needs}: name one of them")
        found[kind] = content
    return found


def kind_of(content: Any) -> str:
    """Say in words what a file holds."""
    for kind, fits in _KINDS.items():
        if fits(content):
            return kind
    if isinstance(content, dict):
        return f"JSON with the keys {sorted(content)[:8]}"
    if not content:
        return "nothing"
    return "a list in JSON" if not isinstance(content[0], str) else f"text that begins with {content[0][:60]!r}"


def _rows(content: Any, name: str, *fields: str) -> bool:
    """Whether ``content[name]`` is a list of objects with these fields, judged by the first."""
    return isinstance(content, dict) and _objects(content.get(name), *fields)


def _objects(rows: Any, *fields: str) -> bool:
    return isinstance(rows, list) and bool(rows) and isinstance(rows[0], dict) and set(fields) <= set(rows[0])


def _lines(content: Any) -> bool:
    return isinstance(content, list) and bool(content) and isinstance(content[0], str)


_KINDS: dict[str, Callable[[Any], bool]] = {
    KARPATHY: lambda c: _rows(c, "images", "filename", "split", "sentences"),
    CAPTIONS: lambda c: _rows(c, "images", "id", "file_name") and _rows(c, "annotations", "image_id", "caption"),
    "COCO pictures without captions": lambda c: _rows(c, "images", "id", "file_name"),
    QUESTIONS: lambda c: _rows(c, "questions", "question_id", "image_id", "question"),
    ANSWERS: lambda c: _rows(c, "annotations", "question_id", "answers"),
    DOCUMENTS: lambda c: _rows(c, "data", "questionId", "question", "image"),
    PAIRS: lambda c: _objects(c, "Flickr30K_ID", "gold_label", "sentence2"),
    NUMBERED: lambda c: _lines(c) and re.match(r"[^\t]+#\d+\t", c[0]) is not None,
    TABLE: lambda c: _lines(c) and c[0].replace(" ", "").lower() == "image,caption",
    NAMES: lambda c: _lines(c) and all(re.fullmatch(r"[^\t,]+\.(jpe?g|png)", line.strip(), re.I) for line in c),
}
