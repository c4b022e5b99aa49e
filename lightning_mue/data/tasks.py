"""What a model is asked about a picture: shard records made into samples, one pure function a task."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image

from lightning_mue.prompt import Word, read_words

Record = Mapping[str, Any]

STATEMENT_WORDS = ("no", "yes", "maybe")
"""The closed answers of tasks ``statement`` and ``match``; the label (0 false, 1 true, 2 maybe) is the position."""


@dataclass(frozen=True)
class Sample:
    """One prompt about one picture.

    Args:
        sample_id: distinct name, ``<picture>#q3`` and the like.
        cluster: the source (picture, receipt, group of statements); samples of one cluster are dependent.
        prompt: what the model is asked.
        references: the accepted answers, at least one, none empty.
        image: the picture; None while it stays in its shard.
        task: the task's name.
        level: difficulty from 1 where the data says one, else 0.
        decoder_prompt: what the decoder reads before it answers; may be empty.
        kinds: what else the data says of a question, such as its type: name -> text.
        words: that stand on the picture, where the task gives them.
    """

    sample_id: str
    cluster: str
    prompt: str
    references: list[str]
    image: Image.Image | None
    task: str
    level: int
    decoder_prompt: str = ""
    kinds: Mapping[str, str] = field(default_factory=dict)
    words: tuple[Word, ...] = ()


def make_samples(record: Record, image: Image.Image | None, task: str) -> list[Sample]:
    """Makes a shard record into samples.

    Args:
        record: the JSON of one picture (fields in the data's README).
        image: its picture, or None to leave it in the shard.
        task: "vqa", "statement", "match" (the same, but the decoder reads the statement), "caption", "reading" or
            "document" (vqa of a page whose words are given).

    Returns:
        The samples in the order of the record.

    Raises:
        ValueError: an unknown task, a record that has no field for it, or an empty text; the message names the sample.
    """
    if task not in _TASKS:
        raise ValueError(f"`task` must be one of {sorted(_TASKS)}, got {task!r}")
    key = record.get("id")
    if not isinstance(key, str) or not key:
        raise ValueError(f"the record must have an `id`, a string that is not empty, got {key!r}")
    try:
        rows = list(_TASKS[task](record))
        if not rows:
            raise ValueError("the record holds nothing to ask")
        cluster, words = _cluster(record, task), read_words(record["words"]) if task == "document" else ()
        samples = [
            Sample(f"{key}#{name}", cluster, _text(prompt, name), _texts(found, name), image, task, int(level), *more)
            for name, prompt, found, level, *more in rows
        ]
        return [replace(sample, words=words) for sample in samples] if words else samples
    except (KeyError, TypeError) as error:
        missing = (
            f"field {error} is missing" if isinstance(error, KeyError) else f"a field has the wrong form ({error})"
        )
        raise ValueError(
            f"task {task!r} cannot be made of sample {key!r}: {missing}; it has {sorted(record)}"
        ) from error
    except ValueError as error:
        raise ValueError(f"task {task!r} cannot be made of sample {key!r}: {error}") from error


def check_also(task: str, also: Sequence[str] | None) -> None:
    """Look whether tasks can be trained beside another.

    Raises:
        ValueError: an unknown task, ``task`` itself, or one named twice.
    """
    names = also or []
    if isinstance(names, str) or not {*names} <= {*_TASKS} - {task} or len({*names}) < len(names):
        raise ValueError(f"`also` may name tasks of {sorted(_TASKS)} other than {task!r}, each once, got {also!r}")


def split_of(cluster: str, fractions: Mapping[str, float], salt: str) -> str:
    """Says which split a cluster belongs to, for ever: by the SHA-256 of salt and key, never by order or run.

    Args:
        cluster: the cluster's key.
        fractions: split -> share, adding up to 1.
        salt: makes independent splits of the same clusters.

    Returns:
        One of the names in ``fractions``.

    Raises:
        ValueError: negative shares, or shares that do not add up to 1.
    """
    if any(share < 0 for share in fractions.values()) or not math.isclose(sum(fractions.values()), 1.0):
        raise ValueError(f"`fractions` must be shares >= 0 that add up to 1, got {dict(fractions)}")
    point, passed = cluster_point(cluster, salt), 0.0
    for name, share in fractions.items():
        passed += share
        if point < passed:
            return name
    return [name for name, share in fractions.items() if share > 0][-1]  # rounding of the sum only


def cluster_point(cluster: str, salt: str) -> float:
    """A number in [0, 1) that only the cluster's key and the salt decide."""
    digest = hashlib.sha256(f"{salt}\n{cluster}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


Row = (
    tuple[str, str, list[str], int]
    | tuple[str, str, list[str], int, str]
    | tuple[str, str, list[str], int, str, dict[str, str]]
)
"""Name, prompt, answers, level; a decoder prompt and kinds if there are any."""


def _vqa(record: Record) -> Iterable[Row]:
    for k, question in enumerate(record["qa"]):
        kinds = {name: text for name, text in question.items() if name != "text" and isinstance(text, str)}
        yield f"q{k}", question["text"], question["refs"], question.get("level", 0), "", kinds


def _statement(record: Record) -> Iterable[Row]:
    for name, text, answer, level in _judged(record):
        yield name, f'does the picture show " {text} " ?', [answer], level


def _match(record: Record) -> Iterable[Row]:
    for name, text, answer, level in _judged(record):
        yield name, _SHOWN, [answer], level, text


def _judged(record: Record) -> Iterable[tuple[str, str, str, int]]:
    """Name, text, answer and level of every statement."""
    rows: list[tuple[str, str, int, int]]
    if "statements" in record:
        rows = [(f"s{k}", s["text"], s["label"], s.get("level", 0)) for k, s in enumerate(record["statements"])]
    elif "text" in record:
        rows = [("s0", record["text"], record["label"], 0)]
    else:
        rows = [(f"r{k}", text, 1, 0) for k, text in enumerate(record["refs"])]
        rows += [(f"n{k}", text, 0, 0) for k, text in enumerate(record["negatives"])]
    for name, text, label, level in rows:
        if label not in range(len(STATEMENT_WORDS)):
            raise ValueError(f"`label` of {name} must be 0 (false), 1 (true) or 2 (maybe), got {label!r}")
        # Sentences end in " .", "." or nothing: the model must not tell them apart by that.
        yield name, _text(text, name).rstrip(" ."), STATEMENT_WORDS[label], level


_SHOWN = "what does the picture show ?"


def _caption(record: Record) -> Iterable[Row]:
    yield "c0", _SHOWN, record["refs"], record.get("level", 0)


def _reading(record: Record) -> Iterable[Row]:
    yield "l0", "what is written ?", list(record["refs"][:1]), 0


_TASKS: dict[str, Callable[[Record], Iterable[Row]]] = {
    "vqa": _vqa,
    "document": _vqa,
    "statement": _statement,
    "match": _match,
    "caption": _caption,
    "reading": _reading,
}


def _cluster(record: Record, task: str) -> str:
    if task == "reading":
        return str(record["id"]).rpartition("-")[0] or str(record["id"])  # the receipt that the line was cut out of
    # NLVR shows one sentence with several pictures: its groups never cross splits, and are what is independent.
    return f"group-{record['group']}" if "group" in record else str(record["id"])


def _text(text: object, name: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"the text of {name} is empty, got {text!r}")
    return " ".join(text.split())


def _texts(texts: object, name: str) -> list[str]:
    if not isinstance(texts, list) or not texts:
        raise ValueError(f"{name} has no reference, got {texts!r}")
    return [_text(text, name) for text in texts]
