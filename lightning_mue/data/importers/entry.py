"""What every data set is parsed into: one picture and the texts about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any


@dataclass(frozen=True)
class Entry:
    """One picture and what is said about it.

    Args:
        key: the record's id and its name in the shard.
        image: the picture's file, relative to the folder of pictures.
        field_name: the record's field that holds the texts: "refs", "qa" or "statements".
        texts: what goes there.
        left_out: one line for each text that cannot be used.
        more: other fields of the record.
    """

    key: str
    image: str
    field_name: str
    texts: list[Any]
    left_out: list[str]
    more: Mapping[str, Any] = field(default_factory=dict)

    def record(self, task: str) -> dict[str, Any]:
        """Return the record of a shard."""
        return {"id": self.key, "task": task, self.field_name: self.texts, **self.more}


def key_of(source: str, name: str | int) -> str:
    """Return the key of a picture: two data sets with the same pictures name them alike.

    Args:
        source: whose pictures they are.
        name: the picture's number, or its file, whose folder and ending are not part of the key.
    """
    # A key ends at the first dot of a member's name.
    return f"{source}-{PurePosixPath(str(name)).stem.replace('.', '-')}"


def captioned(key: str, image: str, captions: Sequence[object]) -> Entry:
    """Return a picture with its captions, empty ones left out."""
    empty = [f"caption {k} of {key} is empty" for k, text in enumerate(captions) if not is_text(text)]
    return Entry(key, image, "refs", [text for text in captions if is_text(text)], empty)


def questioned(
    key: str,
    image: str,
    questions: Iterable[tuple[Any, object, Sequence[object]]],
    kinds: Mapping[Any, Mapping[str, str]] | None = None,
    **more: Any,
) -> Entry:
    """Return a picture with its questions, those that are empty or have no answer left out.

    Args:
        key: of the picture.
        image: its file.
        questions: id, text and answers; empty answers are left out.
        kinds: id -> what else is said of a question, such as its type.
        more: other fields of the record.
    """
    qa, left_out = [], []
    for number, text, answers in questions:
        refs = [answer for answer in answers if is_text(answer)]
        left_out += [f"an answer to question {number} of {key} is empty"] * (len(answers) - len(refs))
        if is_text(text) and refs:
            qa.append({"id": number, "text": text, "refs": refs, **(kinds or {}).get(number, {})})
        else:
            left_out.append(f"question {number} of {key} {'has no answer' if is_text(text) else 'is empty'}")
    return Entry(key, image, "qa", qa, left_out, more)


def is_text(value: object) -> bool:
    """Whether a value is a text with something in it."""
    return isinstance(value, str) and bool(value.strip())


def refuse_twice(names: Iterable[Any], what: str) -> None:
    """Check that no name comes twice.

    Raises:
        ValueError: one does.
    """
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(
            f"{what} must come once, {len(twice)} come more often, first {twice[0]!r}: the annotations are damaged, or "
            "joined from files that overlap; take the official file"
        )
