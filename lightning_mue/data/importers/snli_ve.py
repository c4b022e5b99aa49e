"""SNLI-VE: does a picture of Flickr30k entail a sentence, contradict it, or leave it open?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from lightning_mue.data.importers.annotations import PAIRS, by_kind
from lightning_mue.data.importers.entry import Entry, is_text, key_of, refuse_twice
from lightning_mue.data.importers.layout import Layout

NEEDS = "snli_ve_{train,dev,test}.jsonl"
LABELS = {"contradiction": 0, "entailment": 1, "neutral": 2}
"""In the order of ``STATEMENT_WORDS``: no, yes, maybe."""


def parse(files: Mapping[str, Any], split: str, caption_premise: bool = False) -> Iterator[Entry]:
    """Yield the pictures with their hypotheses as statements.

    Args:
        files: one file.
        split: not used, a file is a split.
        caption_premise: whether a statement also tells the caption that the hypothesis was written for, as in OFA and
            MuE. The hypothesis was written with that caption at hand and without the picture, so the caption alone
            nearly gives the answer, and leaving the image early costs nothing: it measures text, not pictures.

    Raises:
        ValueError: the file is another, or a pair comes twice.
    """
    found = by_kind(files, [PAIRS], NEEDS)
    pairs = defaultdict(list)
    for pair in found[PAIRS]:
        pairs[str(pair["Flickr30K_ID"]).removesuffix(".jpg")].append(pair)
    refuse_twice((pair["pairID"] for pair in found[PAIRS] if "pairID" in pair), "a pair (pairID)")
    for picture, of_picture in pairs.items():
        yield _entry(key_of("flickr30k", picture), f"{picture}.jpg", of_picture, caption_premise)


def _entry(key: str, image: str, pairs: list[Mapping[str, Any]], caption_premise: bool) -> Entry:
    statements, left_out = [], []
    for number, pair in enumerate(pairs):
        name, label = pair.get("pairID", number), pair["gold_label"]
        if label not in LABELS:
            left_out.append(f"pair {name} of {key} has the label {label!r}, which is none of {list(LABELS)}")
        elif not is_text(pair["sentence2"]) or (caption_premise and not is_text(pair.get("sentence1"))):
            left_out.append(f"pair {name} of {key} has an empty sentence")
        else:
            text = pair["sentence2"].strip()
            if caption_premise:
                text = f"{text.rstrip(' .')} , given the caption : {pair['sentence1'].strip()}"
            statements.append({"id": name, "text": text, "label": LABELS[label]})
    return Entry(key, image, "statements", statements, left_out)


def layout(caption_premise: bool = False) -> Layout:
    """Return the layout, with the premise that is asked for; see ``parse``."""
    return Layout(
        name="snli-ve",
        task="statement",
        texts="statements",
        files=lambda split: [(f"snli_ve_{'dev' if split == 'val' else split}.jsonl",)],
        parse=partial(parse, caption_premise=caption_premise),
        options={"caption_premise": caption_premise},
    )


LAYOUT = layout()
