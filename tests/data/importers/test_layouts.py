"""Every official layout, by the command a user types, read back by the reader that training uses."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from lightning_mue.data import ShardsDataModule
from lightning_mue.data.shards import BadSamples, find_shards, read_shards
from lightning_mue.data.store import read_samples
from lightning_mue.data.tasks import split_of
from tests.runs import members_of, mue

from .conftest import coco_captions, karpathy, paint, write


def imported(name, annotations, images, out, *options):
    """Import and return records by id, in order, and their pictures."""
    mue("data", name, "--annotations", annotations, "--images", images, "--out", out, *options)
    split = options[options.index("--split") + 1] if "--split" in options else "train"
    read = list(read_shards(find_shards(out, split), BadSamples()))
    return {record["id"]: record for _, _, record in read}, {record["id"]: place for place, _, record in read}


def asked(out, task, split="train"):
    """Prompt and references of every sample."""
    samples = read_samples(find_shards(out, split), task, BadSamples()).samples
    return [(sample.sample_id, sample.prompt, sample.references) for sample in samples]


def test_coco_captions_of_2014(official, tmp_path, capsys):
    annotations, images = official("coco")
    records, places = imported("coco", annotations, images, tmp_path / "out")
    assert list(records) == ["coco-391895", "coco-522418", "coco-184613"]  # the file's order
    assert records["coco-522418"] == {
        "id": "coco-522418",
        "task": "caption",
        "refs": ["caption 0 of 522418.", "caption 1 of 522418."],
    }
    assert asked(tmp_path / "out", "caption")[2][2] == ["caption 0 of 184613.", "caption 1 of 184613."]
    file = images / "COCO_train2014_000000522418.jpg"
    assert members_of(tmp_path / "out" / "train-000.tar")["coco-522418.jpg"] == file.read_bytes()
    assert np.array_equal(np.asarray(places["coco-522418"].load()), np.asarray(Image.open(file)))
    assert "train: 6 captions on 3 pictures in 1 shards" in capsys.readouterr().out


def test_coco_captions_of_2017_by_file(tmp_path):
    file = write(tmp_path / "captions_val2017.json", coco_captions({139: "000000000139.jpg"}))
    paint(tmp_path / "val2017" / "000000000139.jpg")
    records, _ = imported("coco", file, tmp_path / "val2017", tmp_path / "out", "--split", "val")
    assert list(records) == ["coco-139"]


def test_karpathys_split_trains_on_restval_too(tmp_path):
    parts = {9: "train", 25: "val", 30: "restval", 34: "test"}
    content = karpathy(parts)
    write(tmp_path / "dataset_coco.json", content)
    for image in content["images"]:
        paint(tmp_path / "coco" / image["filepath"] / image["filename"])
    found = {}
    for split in ("train", "val", "test"):
        options = ("--split", split)
        found[split], _ = imported(
            "coco", tmp_path / "dataset_coco.json", tmp_path / "coco", tmp_path / "out", *options
        )
    assert [list(found[split]) for split in found] == [["coco-9", "coco-30"], ["coco-25"], ["coco-34"]]
    assert found["train"]["coco-30"]["refs"] == ["Raw of 30 ."]
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert {split: entry["images"] for split, entry in index["splits"].items()} == {"train": 2, "val": 1, "test": 1}


def test_flickr8k_with_its_lists(official, tmp_path):
    annotations, images = official("flickr8k")
    records, _ = imported("flickr8k", annotations, images, tmp_path / "out")
    assert list(records) == ["flickr8k-14_14abc", "flickr8k-11_11abc", "flickr8k-12_12abc"]  # the list's order
    assert records["flickr8k-11_11abc"]["refs"] == [f"A dog , number {c} of 11_11abc.jpg ." for c in (0, 1)]
    files = [annotations / "Flickr_8k.devImages.txt", annotations / "Flickr8k.token.txt"]
    mue("data", "flickr8k", "--annotations", *files, "--images", images, "--out", tmp_path / "out", "--split", "val")
    assert [i for i, _, _ in asked(tmp_path / "out", "caption", "val")] == ["flickr8k-13_13abc#c0"]


def test_dots_in_the_name_of_a_picture_do_not_break_its_key(tmp_path):
    write(tmp_path / "captions.txt", "image,caption\na.b.c.jpg,A dog")
    write(tmp_path / "names.txt", "a.b.c.jpg")
    paint(tmp_path / "a.b.c.jpg")
    mue(
        "data",
        "flickr8k",
        "--annotations",
        tmp_path / "captions.txt",
        tmp_path / "names.txt",
        "--images",
        tmp_path,
        "--out",
        tmp_path,
    )
    assert asked(tmp_path, "caption") == [("flickr8k-a-b-c#c0", "what does the picture show ?", ["A dog"])]


def test_flickr8k_as_a_table_is_split_by_hash(tmp_path, capsys):
    names = [f"{k}_pic.jpg" for k in range(60)]
    lines = ["image,caption", *(f'{name},"A dog, {c} "' for name in names for c in (0, 1))]
    write(tmp_path / "captions.txt", "\n".join(lines))
    for name in names:
        paint(tmp_path / "Images" / name, (8, 8))
    shares = {"train": 0.75, "val": 0.125, "test": 0.125}
    seen = []
    for split in shares:
        options = ("--split", split)
        records, _ = imported("flickr8k", tmp_path, tmp_path / "Images", tmp_path / "out", *options)
        assert "there is no list of the split: a hash" in capsys.readouterr().out
        assert list(records) == [
            f"flickr8k-{k}_pic" for k in range(60) if split_of(f"flickr8k-{k}_pic", shares, "flickr8k") == split
        ]
        assert {tuple(record["refs"]) for record in records.values()} == {("A dog, 0 ", "A dog, 1 ")}
        seen += records
    assert sorted(seen) == sorted(f"flickr8k-{k}_pic" for k in range(60))


def test_snli_ve_asks_of_the_image_alone(official, tmp_path):
    annotations, images = official("snli-ve")
    records, _ = imported("snli-ve", annotations, images, tmp_path / "out")
    assert records["flickr30k-2407214681"]["statements"] == [
        {"id": "2407214681.jpg#0r1e", "text": "Two women talk.", "label": 1},
        {"id": "2407214681.jpg#1r1n", "text": "They are sisters.", "label": 2},
    ]
    assert asked(tmp_path / "out", "statement") == [
        ("flickr30k-2407214681#s0", 'does the picture show " Two women talk " ?', ["yes"]),
        ("flickr30k-2407214681#s1", 'does the picture show " They are sisters " ?', ["maybe"]),
        ("flickr30k-36979#s0", 'does the picture show " A man sleeps " ?', ["no"]),
    ]


def test_snli_ve_tells_the_caption_where_asked(official, tmp_path):
    annotations, images = official("snli-ve")
    imported("snli-ve", annotations, images, tmp_path / "out", "--caption_premise")
    prompt = asked(tmp_path / "out", "statement")[2][1]
    assert prompt == 'does the picture show " A man sleeps , given the caption : A man runs " ?'
    with pytest.raises(SystemExit, match="caption_premise True, now False"):
        imported("snli-ve", annotations, images, tmp_path / "out")


def kinds(question):
    return {"question_type": f"type of {question}", "answer_type": "other"}


def test_vqa_has_all_ten_answers(official, tmp_path):
    annotations, images = official("vqa")
    records, _ = imported("vqa", annotations, images, tmp_path / "out")
    assert list(records) == ["coco-9", "coco-25"]
    assert records["coco-9"]["qa"] == [
        {"id": 9000, "text": "What is it?", "refs": ["dog"] * 10} | kinds(9000),
        {"id": 9001, "text": "Is it big?", "refs": ["yes"] * 7 + ["no"] * 3} | kinds(9001),
    ]
    data = ShardsDataModule(str(tmp_path / "out"), "vqa", val=str(tmp_path / "out" / "train-*.tar"), image_size=8)
    batch = next(iter(data.train_dataloader()))  # what promises may be about in turn
    expected = {f"coco-9#q{k}": f"type of 900{k}" for k in (0, 1)}
    assert expected.items() <= dict(zip(batch["sample_id"], batch["question_type"], strict=True)).items()
    assert set(batch["answer_type"]) == {"other"}
    assert asked(tmp_path / "out", "vqa")[2] == ("coco-25#q0", "How many?", [str(k) for k in range(10)])


def test_docvqa_keeps_pages_of_a_document_together(official, tmp_path):
    annotations, images = official("docvqa")
    records, _ = imported("docvqa", annotations, images, tmp_path / "out")
    assert records["docvqa-xnbl0037_1"] == {
        "id": "docvqa-xnbl0037_1",
        "task": "vqa",
        "qa": [
            {"id": 337, "text": "what is the date?", "refs": ["1/8/93"]},
            {"id": 340, "text": "what is the year?", "refs": ["1993"]},
        ],
        "group": "xnbl0037",
    }
    assert records["docvqa-xnbl0037_2"]["qa"][0]["refs"] == ["PHILLIPS", "Mr. Phillips"]
    samples = read_samples(find_shards(tmp_path / "out", "train"), "vqa", BadSamples()).samples
    clusters = {sample.sample_id.partition("#")[0]: sample.cluster for sample in samples}
    assert len(clusters) == 3
    assert clusters["docvqa-xnbl0037_1"] == clusters["docvqa-xnbl0037_2"] != clusters["docvqa-pybv0228_81"]
    grey = io.BytesIO(members_of(tmp_path / "out" / "train-000.tar")["docvqa-xnbl0037_1.png"])
    assert Image.open(grey).mode == "L"


@pytest.mark.parametrize(
    ("name", "task"),
    [("coco", "caption"), ("flickr8k", "caption"), ("snli-ve", "statement"), ("vqa", "vqa"), ("docvqa", "vqa")],
)
def test_every_import_trains(official, tmp_path, name, task):
    annotations, images = official(name)
    imported(name, annotations, images, tmp_path / "out")
    shards = [str(shard) for shard in find_shards(tmp_path / "out", "train")]
    data = ShardsDataModule(shards, task, val=shards, batch_size=2, image_size=16, vocab_size=300, select=0.99)
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert sum(len(batch["sample_id"]) for batch in batches) == len(data.train_samples)
    assert all(batch["pixel_values"].shape[1:] == (3, 16, 16) for batch in batches)
