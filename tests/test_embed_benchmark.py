"""The table of embeddings: every line is there, what it says is found again by hand, what does not fit is refused."""

import embed
import numpy as np
import pytest
import torch

from lightning_mue.inference.embedding import EmbedEngine
from lightning_mue.policy import ExitPolicy, ExitRule
from tests import zoo
from tests.inference.test_gallery import CLASSES, Words


class Sample:
    def __init__(self, name, references):
        self.cluster, self.references = name, references


class Data:
    """Twelve test pictures in three batches, the last of no class, and texts that proposed or certified."""

    processor = Words()

    def __init__(self):
        texts = [f"a red {word}" for word in ("square", "circle", "cross")] + [
            "red",
            "green",
            "blue",
            "cross",
            "a cross",
        ]
        sizes = zip([*texts, *CLASSES[3:]], range(14), strict=True)
        self.samples = [Sample(f"c{i}", [text]) for text, i in sizes] + [Sample("held", ["a a a"])]
        self.calibration_samples = self

    def split_of(self, cluster):
        return "certify" if cluster == "held" else "propose"

    def test_dataloader(self):
        pixels = zoo.inputs("coca", 12)["pixel_values"]
        for i in range(0, 12, 4):
            names = [f"t{row}" for row in range(i, i + 4)]
            own = [[CLASSES[row % 9]] if i < 8 else ["a green"] for row in range(i, i + 4)]
            yield {"pixel_values": pixels[i : i + 4], "sample_id": names, "cluster": names, "references": own}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """What runs the script on a tiny model beside two policies, and gives its page."""
    model = zoo.shared("coca")
    rule = {"vision": ExitRule("class_margin", (1, 2), (0.0, 0.0))}
    ExitPolicy({"vision": ExitRule.static(2)}).save(tmp_path / "embed_policy.json")
    ExitPolicy(rule, classes=CLASSES).save(tmp_path / "top_1_policy.json")
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    module = torch.nn.Module()
    module.model = model
    monkeypatch.setattr(embed, "load_run", lambda path, **changed: (module, Data()))

    def page(*more):
        given = ["--ckpt_path", str(tmp_path / "last.ckpt"), "--name", "tiny", "--out", str(tmp_path)]
        embed.main([*given, "--batch-sizes", "1", "2", "--repeats", "2", "--timed-pictures", "4", *more])
        (found,) = tmp_path.glob("embed_tiny_*.md")
        return found.read_text()

    return page


def test_the_page_says_what_is_found_by_hand(run, tmp_path):
    page = run("--classes", str(tmp_path / "classes.txt"), "--candidates", "11")
    retrieval, zero_shot = page.split("\n## ")[1:]
    assert retrieval.startswith("retrieval: 12 pictures in 12 clusters, 11 texts")
    assert zero_shot.startswith("zero-shot: 8 pictures in 8 clusters, 9 texts")
    rows = {line.split(" | ")[0][2:]: line.split(" | ") for line in zero_shot.splitlines() if line.startswith("| ")}
    assert [*rows][:7] == ["line", "---", "full depth", "static 1", "static 2", "static 3", "calibrated"]
    assert rows["calibrated"][1] == "1.00"
    pixels = zoo.inputs("coca", 8)["pixel_values"]
    for name, policy in (("full depth", ExitPolicy()), ("static 2", ExitPolicy({"vision": ExitRule.static(2)}))):
        engine = EmbedEngine(zoo.shared("coca"), policy, processor=Words())
        best = (engine.images(pixels).vectors @ engine.embed_texts(CLASSES).vectors.T).argmax(1)
        assert rows[name][-2] == f"{(best == torch.arange(8)).double().mean():.4f}"
    for figure in ("kept_r5", "speedup", "speedup_b2"):
        assert f"| {figure} |" in retrieval
    for figure in ("kept_top1", "speedup_top1", "speedup_top1_b2"):
        assert f"| {figure} |" in zero_shot


def test_candidates_are_those_that_proposed_and_times_are_of_a_picture(run):
    args = ["--ckpt_path", "last.ckpt", "--name", "tiny"]
    parser = type("Args", (), {"policies": None, "ckpt_path": args[1], "candidates": 14, "classes": None})
    task = embed.make_task("retrieval", zoo.shared("coca"), Data(), parser)
    assert "a a a" not in task.gallery.texts
    assert len(task.gallery.texts) == 14
    assert embed.make_task("zero-shot", zoo.shared("coca"), Data(), parser) is None
    pixels = zoo.inputs("coca", 5)["pixel_values"]
    ms = embed.timed(task.engines, pixels, 2, 3)
    assert all(values.shape == (3,) and (values > 0).all() for values in ms.values())
    assert np.isfinite(ms["full depth"]).all()
    with pytest.raises(ValueError, match="Batches of 8 need"):
        embed.timed(task.engines, pixels, 8, 1)
