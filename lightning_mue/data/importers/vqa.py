"""VQA v2: questions on pictures of COCO, ten answers each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from lightning_mue.data.importers.annotations import ANSWERS, QUESTIONS, by_kind
from lightning_mue.data.importers.entry import Entry, is_text, key_of, questioned, refuse_twice
from lightning_mue.data.importers.layout import Layout

NEEDS = "v2_OpenEnded_mscoco_{train,val}2014_questions.json with v2_mscoco_{train,val}2014_annotations.json"

KINDS = ("question_type", "answer_type")
"""What promises may be about in turn (``group_by``)."""


def parse(files: Mapping[str, Any], split: str) -> Iterator[Entry]:
    """Yield the pictures with their questions; the references are all ten answers.

    Args:
        files: questions and annotations.
        split: not used, the files are a split.

    Raises:
        ValueError: the files are others, do not belong together, or have no answers (as the test splits).
    """
    found = by_kind(files, [QUESTIONS, ANSWERS], NEEDS)
    if ANSWERS not in found:
        raise ValueError(
            f"{' and '.join(files)} holds questions without answers (those of the test splits are not public); "
            f"needed is {NEEDS}"
        )
    if QUESTIONS not in found:
        raise ValueError(f"{' and '.join(files)} holds answers without questions; needed is {NEEDS}")
    subtypes = [found[kind].get("data_subtype") for kind in (QUESTIONS, ANSWERS)]
    if subtypes[0] != subtypes[1] or not isinstance(subtypes[0], str):
        raise ValueError(
            f"questions and annotations must name one `data_subtype` (such as train2014), got {subtypes}: take both "
            "files of one split"
        )
    return _entries(found[QUESTIONS]["questions"], found[ANSWERS]["annotations"], subtypes[0])


def _entries(questions: list[Any], annotations: list[Any], subtype: str) -> Iterator[Entry]:
    refuse_twice((question["question_id"] for question in questions), "a question (question_id)")
    answers = {a["question_id"]: [answer["answer"] for answer in a["answers"]] for a in annotations}
    kinds = {a["question_id"]: {kind: a[kind] for kind in KINDS if is_text(a.get(kind))} for a in annotations}
    by_picture = defaultdict(list)
    for question in questions:
        number = question["question_id"]
        by_picture[question["image_id"]].append((number, question["question"], answers.get(number, [])))
    for picture, of_picture in by_picture.items():
        image = f"{subtype}/COCO_{subtype}_{picture:012d}.jpg"
        yield questioned(key_of("coco", picture), image, of_picture, kinds)


def _files(split: str) -> list[tuple[str, ...]]:
    if split == "test":
        return [("v2_OpenEnded_mscoco_test2015_questions.json",)]
    return [(f"v2_OpenEnded_mscoco_{split}2014_questions.json", f"v2_mscoco_{split}2014_annotations.json")]


LAYOUT = Layout(name="vqa", task="vqa", texts="questions", files=_files, parse=parse)
