"""Imports that stop, go on, meet broken data, and run in several processes: the shards are always the same."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightning_mue.data.importers import LAYOUTS, PictureSettings, import_dataset, jobs
from lightning_mue.data.shards import BadSamples, read_shards
from tests.runs import ROOT, PowerCut, members_of, mue

from .conftest import coco_captions, paint, pair, write

COUNT = 23


@pytest.fixture
def many(tmp_path):
    """Annotations and pictures of more than one shard."""
    names = {k: f"{k:012d}.jpg" for k in range(1, COUNT + 1)}
    for k, name in enumerate(names.values()):
        paint(tmp_path / "images" / name, (30 + k, 24))
    return write(tmp_path / "captions_train2017.json", coco_captions(names)), tmp_path / "images"


def run(many, out, **options):
    options = {"shard_size": 4, "progress": False} | options
    return import_dataset(LAYOUTS["coco"], *many, out, **options)


def files_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def whole(many, tmp_path):
    """The files of an undisturbed import."""
    run(many, tmp_path / "whole")
    return files_of(tmp_path / "whole")


def test_the_files_of_an_import(many, whole, tmp_path):
    assert list(whole) == ["index.json", *(f"train-{k:03d}.tar" for k in range(6)), "train.import.json"]
    index = json.loads(whole["index.json"])
    assert (index["name"], index["generator"]) == ("coco", "lightning_mue.importers/1")
    entry = index["splits"]["train"]
    assert entry["shards"] == [name for name in whole if name.endswith(".tar")]
    assert [entry[name] for name in ("images", "captions", "samples", "left_out")] == [COUNT, 2 * COUNT, COUNT, 0]
    places = [place for place, _, _ in read_shards(sorted((tmp_path / "whole").glob("*.tar")), BadSamples())]
    assert [place.key for place in places] == [f"coco-{k}" for k in range(1, COUNT + 1)]
    assert [place.shard.name for place in places] == [f"train-{k // 4:03d}.tar" for k in range(COUNT)]


@pytest.mark.parametrize("workers", [2, 3])
def test_the_number_of_processes_changes_no_byte(many, whole, tmp_path, workers):
    found = run(many, tmp_path / "out", workers=workers)
    assert files_of(tmp_path / "out") == whole
    assert (found.images, found.texts, found.samples, found.left_out) == (COUNT, 2 * COUNT, COUNT, 0)


@pytest.mark.parametrize("at", [1, 9, COUNT])
def test_an_import_that_failed_goes_on(many, whole, tmp_path, monkeypatch, at):
    prepared, prepare = [], jobs.prepare

    def failing(file, key, settings):
        prepared.append(key)
        if len(prepared) == at:
            raise PowerCut
        return prepare(file, key, settings)

    monkeypatch.setattr(jobs, "prepare", failing)
    with pytest.raises(PowerCut):
        run(many, tmp_path / "out")
    shards = (at - 1) // 4
    assert sorted(p.name for p in (tmp_path / "out").glob("*.tar")) == [f"train-{k:03d}.tar" for k in range(shards)]
    assert not (tmp_path / "out" / "index.json").exists()
    prepared.clear()
    at = None
    run(many, tmp_path / "out")
    assert prepared == [f"coco-{k}" for k in range(4 * shards + 1, COUNT + 1)]  # finished shards are not made again
    assert files_of(tmp_path / "out") == whole
    prepared.clear()
    run(many, tmp_path / "out")
    assert not prepared
    assert files_of(tmp_path / "out") == whole


KILLED = """
import sys
from lightning_mue.data.importers import LAYOUTS, import_dataset

if __name__ == "__main__":
    annotations, images, out, workers = sys.argv[1:]
    import_dataset(LAYOUTS["coco"], annotations, images, out, shard_size=10, workers=int(workers), progress=False)
"""


def alive(group):
    """Processes of a group that are more than their entry in the table."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
            found += [stat.parent.name] if int(pgrp) == group and state != "Z" else []
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("workers", [1, 2])
def test_an_import_that_was_killed_goes_on(tmp_path, workers):
    names = {k: f"{k:012d}.png" for k in range(20)}
    for k, name in enumerate(names.values()):  # the second shard is slow, so that the kill comes while it is made
        paint(tmp_path / "images" / name, (8, 8) if k < 10 else (900, 700))
    many = write(tmp_path / "captions_train2017.json", coco_captions(names)), tmp_path / "images"
    write(tmp_path / "killed.py", KILLED)
    command = [sys.executable, tmp_path / "killed.py", *many, tmp_path / "out", workers]
    child = subprocess.Popen([str(part) for part in command], cwd=ROOT, start_new_session=True)
    deadline = time.monotonic() + 120
    try:
        while not (tmp_path / "out" / "train-000.tar").exists():
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        child.kill()
        child.wait()
        while alive(child.pid):
            assert time.monotonic() < deadline, "processes outlive the one that started them"
            time.sleep(0.05)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    assert not (tmp_path / "out" / "train-001.tar").exists()
    run(many, tmp_path / "out", shard_size=10)
    run(many, tmp_path / "whole", shard_size=10)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"shard_size": 5}, r"shard_size 4, now 5"),
        ({"limit": 7}, "limit None, now 7"),
        ({"settings": PictureSettings(16)}, "size None, now 16, side None, now longest, quality None, now 90"),
    ],
)
def test_other_settings_are_refused_or_start_over(many, whole, tmp_path, changed, message):
    run(many, tmp_path / "out")
    with pytest.raises(FileExistsError, match=rf"{message}.*to go on, name another folder with --out, or start over"):
        run(many, tmp_path / "out", **changed)
    assert files_of(tmp_path / "out") == whole
    run(many, tmp_path / "out", overwrite=True, **changed)
    run(many, tmp_path / "fresh", **changed)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh") != whole


def test_other_annotations_are_refused(many, whole, tmp_path):
    run(many, tmp_path / "out")
    annotations, images = many
    changed = write(tmp_path / "other.json", annotations.read_text().replace("caption 0 of 3.", "a cat."))
    with pytest.raises(FileExistsError, match=r"annotations \w{12}\.\.\., now \w{12}\.\.\."):
        run((changed, images), tmp_path / "out")
    assert files_of(tmp_path / "out") == whole


def test_the_folder_of_other_data_is_left_alone(many, official, tmp_path):
    mue("data", "scenes", "--out", tmp_path / "scenes", "--train", 2, "--val", 0, "--size", 24)
    mine = tmp_path / "mine"
    write(mine / "train-000.tar", "mine")
    mue("data", "vqa", "--annotations", official("vqa")[0], "--images", official("vqa")[1], "--out", tmp_path / "vqa")
    write(tmp_path / "broken" / "index.json", "{")
    for folder, message in {
        "scenes": "no importer wrote",
        "mine": r"holds train-\*\.tar that no importer wrote",
        "vqa": "vqa holds vqa: name another folder",
        "broken": "index.json is broken JSON",
    }.items():
        before = files_of(tmp_path / folder)
        for overwrite in (False, True):
            with pytest.raises(FileExistsError, match=message):
                run(many, tmp_path / folder, overwrite=overwrite)
        assert files_of(tmp_path / folder) == before


def cut_picture(file):
    file.write_bytes(file.read_bytes()[:-100])


def no_end(file):
    """A PNG without its last chunk, which can be decoded, but our reader finds it broken."""
    Image.open(file).save(file, "PNG")
    file.write_bytes(file.read_bytes()[:-12])


def no_picture(file):
    file.write_text("not a picture")


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (lambda file: file.unlink(), "000000000006.jpg, the picture of coco-6, is missing"),
        (cut_picture, "sample 'coco-6' of .*000000000006.jpg has a corrupt picture: image file is truncated"),
        (no_end, "sample 'coco-6' of .*000000000006.jpg has a corrupt picture: truncated PNG file"),
        (no_picture, "sample 'coco-6' of .*000000000006.jpg has a corrupt picture: cannot identify"),
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_broken_pictures_are_all_named_and_refused_or_skipped(many, whole, tmp_path, breaks, message, workers):
    files = [many[1] / f"{k:012d}.jpg" for k in (6, 8, 21)]
    data = [file.read_bytes() for file in files]
    for file in files:
        breaks(file)
    with pytest.raises(ValueError, match=rf"3 pictures or texts are broken: .*--on_bad skip:\n  {message}") as caught:
        run(many, tmp_path / "out", workers=workers)
    assert all(f"{k:012d}.jpg" in str(caught.value) for k in (6, 8, 21))
    skipped = run(many, tmp_path / "out", on_bad="skip", workers=workers)
    assert (skipped.images, skipped.left_out, len(skipped.problems)) == (COUNT - 3, 3, 3)
    keys = [place.key for place, _, _ in read_shards(skipped.shards, BadSamples())]
    assert keys == [f"coco-{k}" for k in range(1, COUNT + 1) if k not in (6, 8, 21)]
    for file, content in zip(files, data, strict=True):
        file.write_bytes(content)
    with pytest.raises(ValueError, match=r"3 pictures, first 'coco-6', are not in the shards: an earlier run left"):
        run(many, tmp_path / "out", workers=workers)
    run(many, tmp_path / "out", overwrite=True, workers=workers)
    assert files_of(tmp_path / "out") == whole


def test_a_repaired_picture_finishes_the_import(many, whole, tmp_path):
    file = many[1] / f"{6:012d}.jpg"
    data = file.read_bytes()
    no_picture(file)
    with pytest.raises(ValueError, match="1 pictures or texts are broken"):
        run(many, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.tar"))) == 5  # all but the one with the broken picture
    file.write_bytes(data)
    run(many, tmp_path / "out")
    assert files_of(tmp_path / "out") == whole


def test_long_lists_of_problems_are_cut(many, tmp_path):
    for k in range(2, COUNT + 1):
        (many[1] / f"{k:012d}.jpg").unlink()
    with pytest.raises(ValueError, match=r"(?s)22 pictures or texts are broken.*coco-21, is missing\n  and 2 more$"):
        run(many, tmp_path / "out")


def test_nothing_at_all_is_refused_even_when_skipping(many, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no pictures: .*nowhere is not a folder"):
        run((many[0], tmp_path / "nowhere"), tmp_path / "out", on_bad="skip")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty holds none of 23 \(first '000000000001.jpg'.*--images"):
        run((many[0], tmp_path / "empty"), tmp_path / "out", on_bad="skip")
    for file in many[1].iterdir():
        no_picture(file)
    with pytest.raises(ValueError, match="every picture was left out"):
        run(many, tmp_path / "out", on_bad="skip")


def test_empty_texts_are_refused_or_skipped(many, tmp_path):
    content = json.loads(many[0].read_text())
    for annotation in content["annotations"]:
        if annotation["image_id"] == 2 or annotation["caption"] == "caption 1 of 5.":
            annotation["caption"] = " "
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 3]
    many = write(tmp_path / "empty.json", content), many[1]
    with pytest.raises(
        ValueError, match=r"(?s)4 pictures or texts.*caption 0 of coco-2 is empty.*coco-3 has no captions"
    ):
        run(many, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    found = run(many, tmp_path / "out", on_bad="skip")
    records = {record["id"]: record for _, _, record in read_shards(found.shards, BadSamples())}
    assert sorted(records) == sorted(f"coco-{k}" for k in range(1, COUNT + 1) if k not in (2, 3))
    assert records["coco-5"]["refs"] == ["caption 0 of 5."]
    assert (found.texts, found.left_out) == (2 * COUNT - 5, 2)


def test_empty_questions_answers_and_labels_are_named(official, tmp_path):
    annotations, images = official("vqa")
    for file, old, new in [
        ("v2_OpenEnded_mscoco_train2014_questions.json", '"How many?"', '""'),
        ("v2_mscoco_train2014_annotations.json", '"answer": "no"', '"answer": ""'),
    ]:
        write(annotations / file, (annotations / file).read_text().replace(old, new))
    with pytest.raises(
        SystemExit, match=r"(?s)an answer to question 9001 of coco-9 is empty.*25000 of coco-25 is empty"
    ):
        mue("data", "vqa", "--annotations", annotations, "--images", images, "--out", tmp_path / "out")
    annotations, images = official("snli-ve")
    lines = [pair("36979", "A man.", "-"), pair("36979", "", "neutral", 1), pair("36979", "A man.", "neutral", 2)]
    write(annotations / "snli_ve_train.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(
        SystemExit, match=r"(?s)36979.jpg#0r1x .* has the label '-', which is none of.*an empty sentence"
    ):
        mue("data", "snli-ve", "--annotations", annotations, "--images", images, "--out", tmp_path / "out")


def test_questions_without_answers_are_named(official, tmp_path):
    annotations, images = official("vqa")
    file = annotations / "v2_mscoco_train2014_annotations.json"
    content = json.loads(file.read_text())
    write(file, content | {"annotations": content["annotations"][:1]})
    with pytest.raises(SystemExit, match=r"(?s)2 pictures or texts .*question 9000 of coco-9 has no answer"):
        mue("data", "vqa", "--annotations", annotations, "--images", images, "--out", tmp_path / "out")


def test_a_damaged_shard_is_found_when_all_are_read_back(many, whole, tmp_path):
    run(many, tmp_path / "out")
    shard = tmp_path / "out" / "train-002.tar"
    shard.write_bytes(shard.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"cannot be read back: shard .*train-002.tar is truncated.*delete that shard"):
        run(many, tmp_path / "out")
    shard.unlink()
    run(many, tmp_path / "out")
    assert files_of(tmp_path / "out") == whole


def test_a_limit_takes_the_first(many, tmp_path):
    found = run(many, tmp_path / "out", limit=5)
    keys = [place.key for place, _, _ in read_shards(found.shards, BadSamples())]
    assert keys == [f"coco-{k}" for k in range(1, 6)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"split": "dev"}, "`split` must be one of"),
        ({"workers": 0}, "`workers` must be at least 1, got 0"),
        ({"shard_size": 0}, "`shard_size` must be at least 1"),
        ({"limit": -1}, "`limit` must be at least 1"),
        ({"on_bad": "ignore"}, "`on_bad` must be"),
    ],
)
def test_arguments_are_checked(many, tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        run(many, tmp_path / "out", **wrong)


@pytest.mark.parametrize("wrong", [{"size": 0}, {"side": "middle"}, {"quality": 96}])
def test_picture_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PictureSettings(**wrong)


@pytest.mark.parametrize(
    ("options", "size"),
    [
        (("--size", 24), (24, 16)),
        (("--size", 24, "--side", "shortest"), (36, 24)),
        (("--size", 60), (60, 40)),
        (("--size", 40, "--side", "shortest", "--quality", 30), (60, 40)),
    ],
)
@pytest.mark.parametrize(
    ("ending", "mode"), [("jpg", "RGB"), ("jpg", "L"), ("jpg", "CMYK"), ("png", "P"), ("png", "1")]
)
def test_pictures_shrink_and_keep_their_shape(tmp_path, options, size, ending, mode):
    file = paint(tmp_path / "images" / f"a.{ending}", (60, 40), mode)
    annotations = write(tmp_path / "a.json", coco_captions({1: file.name}))
    mue("data", "coco", "--annotations", annotations, "--images", file.parent, "--out", tmp_path / "out", *options)
    data = members_of(tmp_path / "out" / "train-000.tar")[f"coco-1.{ending}"]
    if size == (60, 40):  # small enough: not a byte is touched
        assert data == file.read_bytes()
        return
    picture = Image.open(io.BytesIO(data))
    assert picture.size == size
    assert picture.mode == ("L" if mode in ("L", "1") else "RGB")
    if ending == "png":  # nothing but the resizing is lost
        expected = Image.open(file).convert("RGB").resize(size, Image.Resampling.LANCZOS)
        assert np.array_equal(np.asarray(picture.convert("RGB")), np.asarray(expected))


def test_quality_is_that_of_the_encoder(tmp_path):
    file = paint(tmp_path / "images" / "a.jpg", (60, 40))
    annotations = write(tmp_path / "a.json", coco_captions({1: "a.jpg"}))
    for quality in (20, 90):
        out = tmp_path / str(quality)
        import_dataset(LAYOUTS["coco"], annotations, file.parent, out, settings=PictureSettings(30, quality=quality))
        expected = io.BytesIO()
        Image.open(file).resize((30, 20), Image.Resampling.LANCZOS).save(expected, "JPEG", quality=quality)
        assert members_of(out / "train-000.tar")["coco-1.jpg"] == expected.getvalue()


def test_the_ending_is_what_the_picture_is(tmp_path):
    """Some files of public data sets have the wrong ending."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a.jpg", "PNG")
    annotations = write(tmp_path / "a.json", coco_captions({1: "a.jpg"}))
    import_dataset(LAYOUTS["coco"], annotations, tmp_path / "images", tmp_path / "out")
    assert "coco-1.png" in members_of(tmp_path / "out" / "train-000.tar")
