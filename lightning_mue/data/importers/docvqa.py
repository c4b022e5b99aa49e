"""DocVQA: questions on pages of scanned documents."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from lightning_mue.data.importers.annotations import DOCUMENTS, by_kind
from lightning_mue.data.importers.entry import Entry, key_of, questioned, refuse_twice
from lightning_mue.data.importers.layout import Layout

NEEDS = "{train,val}_v1.0_withQT.json or {train,val}_v1.0.json"


def parse(files: Mapping[str, Any], split: str) -> Iterator[Entry]:
    """Yield the pages with their questions; pages of one document are one cluster (``group``).

    Args:
        files: one file.
        split: not used, a file is a split.

    Raises:
        ValueError: the file is another, or has no answers (as the test split).
    """
    questions = by_kind(files, [DOCUMENTS], NEEDS)[DOCUMENTS]["data"]
    if not any("answers" in question for question in questions):
        raise ValueError(
            f"{' and '.join(files)} holds questions without answers (those of the test split are not public); "
            f"needed is {NEEDS}"
        )
    refuse_twice((question["questionId"] for question in questions), "a question (questionId)")
    by_page = defaultdict(list)
    for question in questions:
        by_page[question["image"]].append(question)
    for page, of_page in by_page.items():
        rows = [(q["questionId"], q["question"], q.get("answers") or []) for q in of_page]
        document = of_page[0].get("ucsf_document_id") or of_page[0].get("docId")
        group = {} if document is None else {"group": str(document)}
        yield questioned(key_of("docvqa", page), page, rows, None, **group)


LAYOUT = Layout(
    name="docvqa",
    task="vqa",
    texts="questions",
    files=lambda split: [(f"{split}_v1.0_withQT.json",), (f"{split}_v1.0.json",)],
    parse=parse,
)
