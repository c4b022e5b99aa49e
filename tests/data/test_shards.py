"""Broken files are named, never silent; good ones read as webdataset reads them."""

import io
import json
import pickle
import re

import pytest
import webdataset as wds
from PIL import Image

from lightning_mue.data.shards import BadSamples, find_shards, read_shards
from lightning_mue.data.store import read_samples

from .conftest import png, vqa_members, write_tar


def read(path, on_bad="raise"):
    bad = BadSamples(on_bad)
    return [(place.key, record) for place, _, record in read_shards([path], bad)], bad.messages


def test_reads_what_webdataset_writes_and_as_it_reads(tmp_path):
    path = tmp_path / "train-000.tar"
    with wds.TarWriter(str(path)) as writer:
        for k in range(5):
            writer.write({"__key__": f"s/{k}", "PNG": png((k, 0, 0)), "json": {"id": str(k), "qa": []}})
    expected = [(s["__key__"], s["png"], json.loads(s["json"])) for s in wds.WebDataset(str(path), shardshuffle=False)]
    found = list(read_shards([path], BadSamples()))
    assert [(place.key, data, record) for place, data, record in found] == expected
    for k, (place, _, _) in enumerate(found):
        assert place.load().getpixel((0, 0)) == (k, 0, 0)


@pytest.mark.parametrize("ending", ["pkl", "pickle", "pyd", "pyc", "pth", "txt"])
@pytest.mark.parametrize("on_bad", ["raise", "skip"])
def test_other_endings_are_refused_and_never_unpickled(tmp_path, ending, on_bad):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    members = [*vqa_members(1), ("p9.png", png()), (f"p9.{ending}", pickle.dumps(Payload()))]
    path = write_tar(tmp_path / "train-000.tar", members)
    with pytest.raises(ValueError, match=rf"train-000.tar.*p9\.{ending}"):
        read(path, on_bad)
    assert not (tmp_path / "ran").exists()


def test_every_truncation_is_seen(tmp_path):
    path = write_tar(tmp_path / "train-000.tar", vqa_members(4))
    whole = path.read_bytes()
    data_end = len(whole.rstrip(b"\0"))
    for cut in [0, 1, 100, 512, 700, 1024, 1536, 2048, data_end // 2, data_end - 1, -(-data_end // 512) * 512]:
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"train-000\.tar"):
            read(path)
        samples, messages = read(path, "skip")
        assert len(samples) < 4 or cut >= data_end
        assert any("truncated" in message for message in messages)


def test_a_damaged_header_does_not_end_the_shard_quietly(tmp_path):
    path = write_tar(tmp_path / "train-000.tar", vqa_members(4))
    data = bytearray(path.read_bytes())
    at = data.index(b"p2.png")
    data[at : at + 600] = b"\xff" * 600
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"train-000\.tar is truncated or no tar, after 'p1.json'"):
        read(path)


def jpeg():
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 80).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize("memory", [100, 0])
@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("p9.png", png()[:40]), ("p9.json", {"id": "p9", "qa": []})], "p9.*corrupt picture"),
        ([("p9.png", b"no picture"), ("p9.json", {"id": "p9", "qa": []})], "p9.*corrupt picture"),
        ([("p9.png", b"%!PS-Adobe-3.0 EPSF-3.0"), ("p9.json", {"id": "p9", "qa": []})], "p9.*corrupt picture"),
        ([("p9.png", png())], "p9.*one picture and one .json.*'png'"),
        ([("p9.json", {"id": "p9", "qa": []})], "p9.*one picture and one .json.*'json'"),
        ([("p9.png", png()), ("p9.jpg", png()), ("p9.json", {"id": "p9"})], "p9.*one picture"),
        ([("p9.png", png()), ("p9.json", b"{")], "p9.*broken JSON"),
        ([("p9.png", png()), ("p9.json", b"\xff\xfe")], "p9.*broken JSON"),
        ([("p9.png", png()), ("p9.json", [1])], "p9.*must be an object"),
        ([("p9.png", png()), ("p9.json", {"id": "p9", "qa": [{"text": "a", "refs": [""]}]})], "p9.*is empty"),
        ([("p9.png", png()), ("p9.json", {"id": "p9", "qa": [{"text": " ", "refs": ["a"]}]})], "p9.*is empty"),
        ([("p9.png", png()), ("p9.json", {"id": "p9", "refs": ["a"]})], "p9.*'qa' is missing"),
        ([("p9.png", png()), ("p9.json", {"id": "p0", "qa": [{"text": "a", "refs": ["a"]}]})], "p9.*twice"),
        ([("p1.png", png())], "p1.png.*duplicate"),
    ],
)
def test_a_bad_sample_is_named_or_skipped_and_counted(tmp_path, members, message, memory):
    path = write_tar(tmp_path / "val-000.tar", vqa_members(2) + members)
    with pytest.raises(ValueError, match=f"(?s){message}") as caught:
        read_samples([path], "vqa", BadSamples("raise"), memory)
    assert "val-000.tar" in str(caught.value)
    with pytest.warns(UserWarning, match="1 broken shards or samples were skipped"):
        store = read_samples([path], "vqa", bad := BadSamples("skip"), memory)
    assert [s.sample_id for s in store.samples] == ["p0#q0", "p0#q1", "p1#q0", "p1#q1"]
    assert len(bad.messages) == 1
    assert re.search(message, bad.messages[0])


def test_damage_that_only_decoding_finds_is_named_when_it_is_met(tmp_path):
    cut = jpeg()
    cut = cut[: len(cut) // 2]
    qa = [{"text": "a", "refs": ["b"]}]
    path = write_tar(tmp_path / "a.tar", [*vqa_members(1), ("p9.jpg", cut), ("p9.json", {"id": "p9", "qa": qa})])
    with pytest.raises(ValueError, match=r"p9.*corrupt"):
        read_samples([path], "vqa", BadSamples("raise"))
    store = read_samples([path], "vqa", BadSamples("raise"), memory_limit_mb=0)
    with pytest.raises(ValueError, match=r"p9.*corrupt"):
        store.load(2)
    lenient = read_samples([path], "vqa", BadSamples("skip"), memory_limit_mb=0)
    assert lenient.load(2) is None
    assert len(lenient.bad.messages) == 1


def test_pictures_beyond_the_memory_limit_stay_in_the_shard(tmp_path):
    path = write_tar(tmp_path / "a.tar", vqa_members(10, questions=1))
    store = read_samples([path], "vqa", BadSamples(), memory_limit_mb=3 * 64 * 4 / 1e6)  # four pictures of 8 x 8
    assert [s.image is not None for s in store.samples] == [True] * 4 + [False] * 6
    assert [store.load(k).image.getpixel((3, 3)) for k in range(10)] == [(k, 0, 7) for k in range(10)]


def test_few_questions_of_a_picture(tmp_path):
    path = write_tar(tmp_path / "a.tar", vqa_members(10, questions=5))
    ids = [s.sample_id for s in read_samples([path], "vqa", BadSamples(), questions_per_picture=2, salt="x").samples]
    assert len(ids) == len(set(ids)) == 20
    assert ids == [s.sample_id for s in read_samples([path], "vqa", BadSamples(), 0, 2, "x").samples]
    assert ids != [s.sample_id for s in read_samples([path], "vqa", BadSamples(), 0, 2, "y").samples]
    assert len({i.rpartition("#")[2] for i in ids}) == 5


def test_find_shards(tmp_path):
    made = [write_tar(tmp_path / f"{n}.tar", []) for n in ("train-001", "train-000", "val-000")]
    assert find_shards(tmp_path, "train") == [made[1], made[0]]
    assert find_shards(str(tmp_path / "*-000.tar"), "train") == [made[1], made[2]]
    assert find_shards([str(made[2]), str(tmp_path), str(made[0])], "train") == [made[2], made[1], made[0]]
    for wrong, message in ((tmp_path, "no test data"), (tmp_path / "none", "none"), ([], "empty")):
        with pytest.raises(FileNotFoundError, match=message):
            find_shards(wrong, "test")
