"""Annotations that are not what was asked for: the message says what they are and what is needed."""

import json

import pytest

from tests.runs import mue

from .conftest import (
    WRITERS,
    coco_captions,
    docvqa_rows,
    karpathy,
    paint,
    pair,
    vqa_annotations,
    vqa_questions,
    write,
)

QA = [(1, 9, "What?")]
TEN = {1: ["a"] * 10}
PAGE = (1, "q", "p", "d", ["a"])
CAPTIONS = coco_captions({9: "x.jpg"})
PICTURE = CAPTIONS["images"][0]

WRONG = {
    "vqa": [
        ({"a.json": CAPTIONS}, r"a\.json holds COCO captions; needed is v2_OpenEnded"),
        ({"a.json": vqa_questions("test2015", QA)}, r"a\.json holds questions without answers \(those of the test"),
        ({"a.json": vqa_annotations("train2014", TEN)}, r"a\.json holds answers without questions; needed is"),
        (
            {"q.json": vqa_questions("val2014", QA), "a.json": vqa_annotations("train2014", TEN)},
            r"one `data_subtype` .*, got \['val2014', 'train2014'\]: take both files of one split",
        ),
        (
            {"q.json": vqa_questions("val2014", QA * 2), "a.json": vqa_annotations("val2014", TEN)},
            r"a question \(question_id\) must come once, 1 come more often, first 1",
        ),
    ],
    "coco": [
        ({"a.json": vqa_questions("val2014", QA)}, r"a\.json holds VQA questions; needed is captions_"),
        ({"a.json": {"images": [PICTURE]}}, "holds COCO pictures without captions; needed is"),
        ({"a.json": {"images": [], "dataset": "coco"}}, r"holds JSON with the keys \['dataset', 'images'\]"),
        ({"a.json": karpathy({9: "train"}), "b.json": CAPTIONS}, "coco takes one file, captions_"),
        ({"a.json": CAPTIONS, "b.json": CAPTIONS}, r"b\.json holds COCO captions, and so does .* name one of them"),
        (
            {"a.json": {"images": [{"filename": "x.jpg", "split": "train", "sentences": []}], "dataset": "flickr8k"}},
            "the split of 'flickr8k' holds no pictures of COCO",
        ),
        ({"a.json": karpathy({9: "test"})}, "holds no pictures of the split 'train'; name the file"),
        ({"a.json": '{"images": ['}, r"a\.json begins like JSON and is broken: .*download it again"),
        ({"a.json": ""}, r"a\.json holds nothing; needed is"),
        ({"a.json": CAPTIONS | {"images": [PICTURE] * 2}}, "a picture must come once, 1 come .*, first 'coco-9'"),
        (
            {"a.json": CAPTIONS | {"annotations": [*CAPTIONS["annotations"], {"id": 4}]}},
            r"an annotation has not the official form \('image_id' is missing\); download it again",
        ),
    ],
    "flickr8k": [
        ({"a.json": karpathy({9: "train"})}, "holds a Karpathy split .*; needed is Flickr8k.token.txt"),
        ({"a.txt": "one.jpg\ntwo.jpg\n"}, r"a\.txt: needed is one file of captions"),
        ({"a.txt": "one.jpg#0 no tab"}, "holds text that begins with 'one.jpg#0 no tab'; needed is"),
        ({"a.txt": "one.jpg#0\tA dog\ntwo.jpg"}, "line 2 of the captions must be NAME.jpg#0, a tab and a"),
        ({"a.txt": "image,caption\none.jpg,A dog, there"}, "row 2 of the captions must be a picture and a"),
    ],
    "snli-ve": [
        ({"a.json": docvqa_rows([PAGE])}, "holds DocVQA questions; needed is snli_ve_"),
        ({"a.jsonl": json.dumps([pair("1", "A.", "neutral")] * 2)}, r"a pair \(pairID\) must come once"),
    ],
    "docvqa": [
        ({"a.json": docvqa_rows([(*PAGE[:4], None)])}, "holds questions without answers .*needed is {train"),
        ({"a.json": docvqa_rows([PAGE] * 2)}, r"a question \(questionId\) must come once"),
        ({"a.json": [1, 2]}, r"a\.json holds a list in JSON; needed is {train,val}"),
    ],
}


@pytest.mark.parametrize(("name", "files", "message"), [(name, *row) for name, rows in WRONG.items() for row in rows])
def test_wrong_files_are_named(tmp_path, name, files, message):
    paths = [write(tmp_path / file, content) for file, content in files.items()]
    paint(tmp_path / "images" / "x.jpg")
    with pytest.raises(SystemExit, match=rf"(?s)mue data: .*{message}") as stopped:
        mue("data", name, "--annotations", *paths, "--images", tmp_path / "images", "--out", tmp_path / "out")
    assert stopped.value.code
    assert not (tmp_path / "out").exists()


def attempt(name, annotations, folder):
    mue("data", name, "--annotations", annotations, "--images", folder, "--out", folder / "out")


def test_an_archive_is_no_text(tmp_path):
    (tmp_path / "annotations.zip").write_bytes(b"PK\x03\x04\xff\xfe\x00")
    with pytest.raises(SystemExit, match="it is no text; an archive must be unpacked first"):
        attempt("coco", tmp_path / "annotations.zip", tmp_path)


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_a_folder_without_the_official_files_says_which(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=r"no annotations: .*empty holds no .*name the files themselves"):
        attempt(name, tmp_path / "empty", tmp_path)
    with pytest.raises(SystemExit, match=r"no annotations: .*none\.json is not a file"):
        attempt(name, tmp_path / "none.json", tmp_path)


def test_a_folder_with_two_sets_of_files_is_not_guessed_at(official, tmp_path):
    annotations, _ = official("coco")
    write(annotations / "captions_train2017.json", CAPTIONS)
    with pytest.raises(SystemExit, match=r"holds captions_train2014.json and captions_train2017.json: name the files"):
        attempt("coco", annotations, tmp_path)
