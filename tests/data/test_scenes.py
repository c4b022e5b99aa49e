"""Scenes against an oracle that reads only the grid and the words."""

import io
import itertools
import json
import re
import tarfile
import time
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from lightning_mue.data.scenes import SceneMix, scene_sample, write_scenes

STEP = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
RELATION = "|".join(STEP)
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
SHAPES = ("circle", "square", "triangle", "cross")
PIXEL = {
    "red": (220, 40, 40),
    "green": (40, 190, 60),
    "blue": (60, 90, 240),
    "yellow": (235, 215, 50),
    "purple": (165, 60, 200),
    "cyan": (50, 205, 220),
}


def cells_of(grid):
    return {(k // 3, k % 3): tuple(c) if isinstance(c, list) else c for k, c in enumerate(grid)}


def oracle_answer(grid, text):
    """The answer by reading the sentence, independent of how it was made."""
    cells = cells_of(grid)
    things = {at: c for at, c in cells.items() if isinstance(c, tuple)}
    if match := re.fullmatch(r"what (shape|color) is there \?", text):
        assert len(things) == 1
        return next(iter(things.values()))[match[1] == "shape"]
    if match := re.fullmatch(r"what color is the (\w+) \?", text):
        (answer,) = [c for c, s in things.values() if s == match[1]]
        return answer
    if match := re.fullmatch(r"what shape is (\w+) \?", text):
        (answer,) = [s for c, s in things.values() if c == match[1]]
        return answer
    if text.startswith("name"):
        lines = {"top row": (0, None), "middle row": (1, None), "bottom row": (2, None)}
        lines |= {"left column": (None, 0), "middle column": (None, 1), "right column": (None, 2)}
        match = re.fullmatch(
            r"name (?:all shapes|the shapes from (?:left to right|top to bottom) in the (.+)) \?", text
        )
        row, column = lines[match[1]] if match[1] else (None, None)
        chosen = [t for (r, c), t in sorted(things.items()) if row in (None, r) and column in (None, c)]
        return " , ".join(" ".join(t) for t in chosen)
    steps = re.findall(rf"\b({RELATION})\b", text)
    thing = tuple(re.search(r"the (\w+ \w+) \?$", text)[1].split())
    (at,) = [at for at, c in things.items() if c == thing]
    for relation in reversed(steps):
        at = tuple(a + b for a, b in zip(at, STEP[relation], strict=True))
        if at is None or cells.get(at) is None:
            return "nothing"
        assert cells[at] != "curtain"
    return " ".join(cells[at])


def holds(cells, text):
    """Truth of a statement on a grid without curtains."""
    things = [c for c in cells.values() if c]
    if match := re.fullmatch(r"there is (a|no) (.+)", text):
        words = set(match[2].split()) - {"shape"}
        return any(words <= set(t) for t in things) == (match[1] == "a")
    if match := re.fullmatch(r"there (?:is|are) exactly (\w+) (.+)", text):
        number = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"].index(match[1])
        singular = {"crosses": "cross"} | {f"{s}s": s for s in SHAPES} | {s: s for s in SHAPES}
        words = {singular.get(w, w) for w in match[2].split()} - {"shape", "shapes"}
        return sum(words <= set(t) for t in things) == number
    names = [tuple(n.split()) for n in re.findall(r"a (\w+ \w+)", text)]
    relations = re.findall(rf"\b({RELATION})\b", text)
    for path in itertools.product(cells, repeat=len(names)):
        if all(cells[at] == name for at, name in zip(path, names, strict=True)) and all(
            tuple(b + s for b, s in zip(path[k + 1], STEP[r], strict=True)) == path[k] for k, r in enumerate(relations)
        ):
            return True
    return False


def oracle_label(grid, text):
    """Tries everything that may be behind the curtains."""
    cells = cells_of(grid)
    hidden = [at for at, c in cells.items() if c == "curtain"]
    contents = [None, *itertools.product(COLOURS, SHAPES)]
    if len(hidden) == 2:  # only what the sentence names can matter, and one thing that it does not
        words = {word[: len(word) - cut] for word in text.split() for cut in (0, 1, 2)}  # plurals
        named = [t for t in contents if t and set(t) & words]
        contents = [None, *named]
    truths = {
        holds(cells | dict(zip(hidden, filling, strict=True)), text)
        for filling in itertools.product(contents, repeat=len(hidden))
    }
    return 2 if len(truths) == 2 else int(truths.pop())


def test_answers_are_what_the_grid_says():
    seen = Counter()
    for index in range(400):
        record = scene_sample(3, index)[1]
        for question in record["qa"]:
            assert question["refs"] == [oracle_answer(record["grid"], question["text"])], (record["grid"], question)
            seen[question["level"]] += 1
    assert set(seen) == {1, 2, 3, 4, 5}
    assert min(seen.values()) > 30


def test_statement_labels_are_what_every_filling_of_the_curtains_says():
    seen = Counter()
    for index in range(120):
        record = scene_sample(4, index)[1]
        if record["grid"].count("curtain") < 2 or index % 3 == 0:
            for statement in record["statements"]:
                assert statement["label"] == oracle_label(record["grid"], statement["text"]), (record, statement)
                seen[statement["label"]] += 1
    assert min(seen[k] for k in (0, 1, 2)) > 10


def test_captions_list_the_visible_objects_in_reading_order():
    for index in range(100):
        record = scene_sample(5, index)[1]
        things = [c for c in record["grid"] if isinstance(c, list)]
        assert record["level"] == len(things)
        assert len(record["refs"]) == len(set(record["refs"])) >= 2
        for text in record["refs"]:
            words = [w for w in text.split() if w in COLOURS or w in SHAPES]
            assert words == [w for thing in things for w in thing]
            assert text == text.lower() == " ".join(text.split())


def test_pictures_show_the_grid():
    for index in range(60):
        picture, record = scene_sample(6, index)
        assert (picture.size, picture.mode) == ((48, 48), "RGB")
        pixels = np.asarray(picture, dtype=int)
        for (row, column), cell in cells_of(record["grid"]).items():
            middle = pixels[16 * row + 4 : 16 * row + 12, 16 * column + 4 : 16 * column + 12].reshape(-1, 3)
            bright = middle[middle.max(axis=1) > 100]
            if cell is None:
                assert len(bright) == 0
            elif cell == "curtain":
                assert (middle == 128).all()
            else:
                near = min(PIXEL, key=lambda name: abs(np.median(bright, axis=0) - PIXEL[name]).sum())
                assert near == cell[0]


def test_the_four_shapes_differ_in_area():
    mix = SceneMix(objects={1: 1}, curtains=0)
    share = {}
    for index in range(200):
        picture, record = scene_sample(0, index, mix=mix)
        shape = next(c for c in record["grid"] if c)[1]
        bright = np.argwhere(np.asarray(picture).max(axis=2) > 100)
        box = np.prod(bright.max(axis=0) - bright.min(axis=0) + 1)
        share.setdefault(shape, []).append(len(bright) / box)
    means = {shape: np.mean(values) for shape, values in share.items()}
    assert means["cross"] < means["circle"] < means["square"] == 1.0
    assert 0.45 < means["triangle"] < 0.68


def test_scenes_depend_on_seed_and_index_alone():
    first, again = scene_sample(1, 7), scene_sample(1, 7)
    assert first[1] == again[1]
    assert first[0].tobytes() == again[0].tobytes()
    assert len({scene_sample(s, i)[0].tobytes() for s in range(3) for i in range(50)}) == 150
    assert scene_sample(1, 7, size=96)[1] == first[1]


def test_a_mix_chooses_objects_levels_and_counts():
    mix = SceneMix(objects={4: 1}, levels={3: 1.0}, questions_per_scene=2, statements_per_scene=0, curtains=1.0)
    for index in range(30):
        record = scene_sample(0, index, mix=mix)[1]
        assert record["level"] == 4
        assert "curtain" in record["grid"]
        assert record["statements"] == []
        assert len(record["qa"]) <= 2
        assert {q["level"] for q in record["qa"]} <= {3}


@pytest.mark.parametrize("wrong", [{"objects": {10: 1}}, {"levels": {}}, {"levels": {3: 0}}, {"curtains": 2}])
def test_an_impossible_mix_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SceneMix(**wrong)


def test_a_scene_takes_less_than_a_millisecond_or_so():
    scene_sample(0, 0)
    begin = time.process_time()
    for index in range(200):
        scene_sample(0, index)
    assert (time.process_time() - begin) / 200 < 3e-3  # 0.5 ms on an idle core


def test_shards_hold_the_scenes_and_are_written_once(tmp_path):
    shards = write_scenes(tmp_path, 1003, seed=2, mix=SceneMix(questions_per_scene=1), progress=False)
    assert [s.name for s in shards] == ["train-000.tar", "train-001.tar"]
    with tarfile.open(shards[1]) as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar}
    picture, record = scene_sample(2, 1002, mix=SceneMix(questions_per_scene=1))
    assert json.loads(members[f"{record['id']}.json"]) == record
    assert Image.open(io.BytesIO(members[f"{record['id']}.png"])).tobytes() == picture.tobytes()
    assert len(members) == 6
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["splits"]["train"]["samples"] == 1003
    stamps = [s.stat().st_mtime_ns for s in shards]
    assert write_scenes(tmp_path, 1003, seed=2, mix=SceneMix(questions_per_scene=1), progress=False) == shards
    assert [s.stat().st_mtime_ns for s in shards] == stamps
    smaller = write_scenes(tmp_path, 3, seed=2, progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["index.json", "train-000.tar"]
    assert smaller[0].stat().st_size < 30_000


def test_splits_share_no_scene_and_one_index(tmp_path):
    for split in ("train", "val"):
        write_scenes(tmp_path, 20, seed=0, split=split, progress=False)
    names = []
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}-000.tar") as tar:
            names += tar.getnames()
    assert len(set(names)) == 80
    assert set(json.loads((tmp_path / "index.json").read_text())["splits"]) == {"train", "val"}


def test_foreign_data_is_never_overwritten(tmp_path):
    (tmp_path / "train-000.tar").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="did not write"):
        write_scenes(tmp_path, 3, progress=False)
    assert (tmp_path / "train-000.tar").read_bytes() == b"mine"
