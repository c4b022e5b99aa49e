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
        self.sample_id, self.cluster, self.references = name, name, references


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

    def val_dataloader(self):
        pixels = zoo.inputs("coca", len(self.samples), seed=1)["pixel_values"]
        for i in range(0, len(self.samples), 4):
            yield {
                "pixel_values": pixels[i : i + 4],
                "sample_id": [sample.sample_id for sample in self.samples[i : i + 4]],
            }

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
    ExitPolicy({"text": ExitRule.static(1)}).save(tmp_path / "embed_text_policy.json")
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


def rows_of(section):
    """Return name -> cells of a line of the table."""
    return {line.split(" | ")[0][2:]: line.split(" | ") for line in section.splitlines() if line.startswith("| ")}


def texts_by_hand(policy):
    """Return the share of test texts whose own picture comes before all candidates that they do not describe."""
    engine, data = EmbedEngine(zoo.shared("coca"), policy, processor=Words()), Data()
    encode, hits = zoo.shared("coca").coca.encode_image, []
    drawn = embed.Search("recall_at_1", "text", 11).among(
        {s.sample_id: (s.cluster, s.references) for s in data.samples if s.cluster != "held"}
    )
    candidates = {
        name: encode(row[None])[0]
        for batch in data.val_dataloader()
        for name, row in zip(batch["sample_id"], batch["pixel_values"], strict=True)
        if name in drawn
    }
    for batch in data.test_dataloader():
        for (text,), row in zip(batch["references"], batch["pixel_values"], strict=True):
            vector = engine.embed_texts([text]).vectors[0]
            own = vector @ encode(row[None])[0]
            hits.append(all(vector @ other < own for name, other in candidates.items() if text not in drawn[name]))
    return sum(hits) / len(hits)


@torch.no_grad()
def test_the_page_says_what_is_found_by_hand(run, tmp_path):
    page = run("--classes", str(tmp_path / "classes.txt"), "--candidates", "11")
    retrieval, zero_shot, of_texts = page.split("\n## ")[1:]
    assert retrieval.startswith("retrieval: 12 pictures in 12 clusters, 11 texts")
    assert zero_shot.startswith("zero-shot: 8 pictures in 8 clusters, 9 texts")
    assert of_texts.startswith("text retrieval: 12 texts in 12 clusters, 11 pictures")
    rows = rows_of(zero_shot)
    assert [*rows][:7] == ["line", "---", "full depth", "static 1", "static 2", "static 3", "calibrated"]
    assert rows["calibrated"][1] == "1.00"
    pixels = zoo.inputs("coca", 8)["pixel_values"]
    for name, policy in (("full depth", ExitPolicy()), ("static 2", ExitPolicy({"vision": ExitRule.static(2)}))):
        engine = EmbedEngine(zoo.shared("coca"), policy, processor=Words())
        best = (engine.images(pixels).vectors @ engine.embed_texts(CLASSES).vectors.T).argmax(1)
        assert rows[name][-2] == f"{(best == torch.arange(8)).double().mean():.4f}"
    rows = rows_of(of_texts)
    assert [*rows][:5] == ["line", "---", "full depth", "static 1", "calibrated"]
    assert rows["static 1"][1] == rows["calibrated"][1] == "1.00"
    for name, policy in (("full depth", ExitPolicy()), ("static 1", ExitPolicy({"text": ExitRule.static(1)}))):
        assert rows[name][6] == f"{texts_by_hand(policy):.4f}"
    for figure in ("kept_text_r5", "speedup_text_r5", "speedup_text_r5_b2"):
        assert f"| {figure} |" in of_texts
    for figure in ("kept_r5", "speedup", "speedup_b2"):
        assert f"| {figure} |" in retrieval
    for figure in ("kept_top1", "speedup_top1", "speedup_top1_b2"):
        assert f"| {figure} |" in zero_shot


def test_candidates_are_those_that_proposed_and_times_are_of_a_picture(run):
    args = ["--ckpt_path", "last.ckpt", "--name", "tiny"]
    parser = type("Args", (), {"policies": None, "ckpt_path": args[1], "candidates": 14, "classes": None})
    task = embed.make_task("retrieval", zoo.shared("coca"), Data(), parser)
    assert ["a a a"] not in task.lookup.gallery.texts
    assert len(task.lookup.gallery.texts) == 14
    assert embed.make_task("zero-shot", zoo.shared("coca"), Data(), parser) is None
    pixels = zoo.inputs("coca", 5)["pixel_values"]
    ms = embed.timed(task.engines, task.query, pixels, 2, 3)
    assert all(values.shape == (3,) and (values > 0).all() for values in ms.values())
    assert np.isfinite(ms["full depth"]).all()
    with pytest.raises(ValueError, match="Batches of 8 need"):
        embed.timed(task.engines, task.query, pixels, 8, 1)
