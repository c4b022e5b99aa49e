"""Tiny data sets in the official layouts, written as their authors write them."""

import json

import numpy as np
import pytest
from PIL import Image

COCO_IDS = (391895, 522418, 184613)


def paint(path, size=(40, 30), mode="RGB"):
    """A picture of noise that its name decides, so that no two are alike."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(list(path.stem.encode()))
    noise = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(path)
    return path


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return path


def coco_captions(names, captions=2):
    """As captions_train2014.json: pictures and captions in orders of their own."""
    return {
        "info": {"year": 2014},
        "licenses": [],
        "images": [{"id": number, "file_name": name, "height": 30, "width": 40} for number, name in names.items()],
        "annotations": [
            {"id": 10 * k + c, "image_id": number, "caption": f"caption {c} of {number}."}
            for c in range(captions)
            for k, number in enumerate(reversed(names))
        ],
    }


def karpathy(parts):
    """As dataset_coco.json: id -> split."""
    images = [
        {
            "filepath": "val2014" if part != "train" else "train2014",
            "filename": f"COCO_{'val2014' if part != 'train' else 'train2014'}_{number:012d}.jpg",
            "cocoid": number,
            "imgid": k,
            "split": part,
            "sentids": [k],
            "sentences": [{"raw": f"Raw of {number} .", "tokens": ["raw"], "imgid": k, "sentid": k}],
        }
        for k, (number, part) in enumerate(parts.items())
    ]
    return {"images": images, "dataset": "coco"}


def vqa_questions(subtype, questions):
    """As v2_OpenEnded_mscoco_train2014_questions.json: (question id, image id, text)."""
    rows = [{"question_id": q, "image_id": i, "question": text} for q, i, text in questions]
    return {"info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "data_subtype": subtype, "questions": rows}


def vqa_annotations(subtype, answers):
    """As v2_mscoco_train2014_annotations.json: question id -> ten answers."""
    rows = [
        {
            "question_id": q,
            "image_id": 1,
            "question_type": f"type of {q}",
            "answer_type": "other",
            "multiple_choice_answer": ten[0],
            "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": k} for k, a in enumerate(ten, 1)],
        }
        for q, ten in answers.items()
    ]
    return {"info": {}, "data_type": "mscoco", "data_subtype": subtype, "annotations": rows}


def docvqa_rows(rows):
    """As train_v1.0_withQT.json: (question id, question, picture, document, answers or None)."""
    data = []
    for number, question, page, document, answers in rows:
        row = {"questionId": number, "question": question, "question_types": ["form"], "image": f"documents/{page}.png"}
        row |= {
            "docId": number // 10,
            "ucsf_document_id": document,
            "ucsf_document_page_no": "1",
            "data_split": "train",
        }
        data.append(row if answers is None else row | {"answers": answers})
    return {"dataset_name": "SP-DocVQA", "dataset_version": "1.0", "dataset_split": "train", "data": data}


def pair(picture, sentence, label, number=0, premise="Two people talk."):
    """A line of snli_ve_train.jsonl."""
    code = {"entailment": "e", "neutral": "n", "contradiction": "c"}.get(label, "x")
    return {
        "Flickr30K_ID": picture,
        "annotator_labels": [label],
        "captionID": f"{picture}.jpg#{number}",
        "gold_label": label,
        "pairID": f"{picture}.jpg#{number}r1{code}",
        "sentence1": premise,
        "sentence2": sentence,
    }


def write_coco(folder):
    names = {number: f"COCO_train2014_{number:012d}.jpg" for number in COCO_IDS}
    for k, name in enumerate(names.values()):
        paint(folder / "images" / "train2014" / name, (40 + 8 * k, 30))
    write(folder / "annotations" / "captions_train2014.json", coco_captions(names))
    return folder / "annotations", folder / "images" / "train2014"


def write_flickr8k(folder):
    names = [f"{k}_{k}abc.jpg" for k in (11, 12, 13, 14)]
    for name in names:
        paint(folder / "Flicker8k_Dataset" / name)
    lines = [f"{name}#{c}\tA dog , number {c} of {name} ." for name in names for c in (0, 1)]
    lines.insert(2, "11_11abc.jpg.1#0\tA caption of a picture that there is not .")  # the official file has such lines
    write(folder / "text" / "Flickr8k.token.txt", "\n".join(lines) + "\n")
    write(folder / "text" / "Flickr_8k.trainImages.txt", "\r\n".join([names[3], names[0], names[1]]) + "\r\n")
    write(folder / "text" / "Flickr_8k.devImages.txt", names[2] + "\n")
    return folder / "text", folder / "Flicker8k_Dataset"


def write_snli_ve(folder):
    pairs = [
        pair("2407214681", "Two women talk.", "entailment"),
        pair("36979", "A man sleeps.", "contradiction", premise="A man runs ."),
        pair("2407214681", "They are sisters.", "neutral", 1),
    ]
    for name in ("2407214681", "36979"):
        paint(folder / "flickr30k-images" / f"{name}.jpg")
    write(folder / "snli_ve_train.jsonl", "".join(json.dumps(row) + "\n" for row in pairs))
    return folder, folder / "flickr30k-images"


def write_vqa(folder):
    questions = [(9000, 9, "What is it?"), (25000, 25, "How many?"), (9001, 9, "Is it big?")]
    answers = {9001: ["yes"] * 7 + ["no"] * 3, 9000: ["dog"] * 10, 25000: [str(k) for k in range(10)]}
    write(folder / "v2_OpenEnded_mscoco_train2014_questions.json", vqa_questions("train2014", questions))
    write(folder / "v2_mscoco_train2014_annotations.json", vqa_annotations("train2014", answers))
    for number in (9, 25):
        paint(folder / "images" / f"COCO_train2014_{number:012d}.jpg")
    return folder, folder / "images"


def write_docvqa(folder):
    rows = [
        (337, "what is the date?", "xnbl0037_1", "xnbl0037", ["1/8/93"]),
        (338, "who is it to?", "xnbl0037_2", "xnbl0037", ["PHILLIPS", "Mr. Phillips"]),
        (339, "what is the sum?", "pybv0228_81", "pybv0228", ["12"]),
        (340, "what is the year?", "xnbl0037_1", "xnbl0037", ["1993"]),
    ]
    for page in ("xnbl0037_1", "xnbl0037_2", "pybv0228_81"):
        paint(folder / "documents" / f"{page}.png", (60, 80), "L")
    write(folder / "train_v1.0_withQT.json", docvqa_rows(rows))
    return folder, folder


WRITERS = {
    "coco": write_coco,
    "flickr8k": write_flickr8k,
    "snli-ve": write_snli_ve,
    "vqa": write_vqa,
    "docvqa": write_docvqa,
}


@pytest.fixture
def official(tmp_path):
    """Name of a data set -> (annotations, images), written on demand."""
    return lambda name: WRITERS[name](tmp_path / "official" / name)
