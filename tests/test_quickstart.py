"""The quickstart, made small: every step of the life cycle runs and leaves what it promises."""

import base64
import html
import io
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from lightning_mue import quickstart as module
from lightning_mue.cli import main
from lightning_mue.data.shards import BadSamples
from lightning_mue.data.store import read_samples
from lightning_mue.data.tasks import Sample
from lightning_mue.export import load
from lightning_mue.policy import ExitPolicy

PICTURES = {"train": 60, "val": 40, "test": 8}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PICTURES", PICTURES)
        patch.setattr(module, "TIMED_SAMPLES", 2)
        main(["quickstart", "--out", str(folder), "--keep", "0.9", "--steps", "4", "--methods"])
    return folder


@pytest.fixture(scope="module")
def page(out):
    return (out / "report.html").read_text()


def test_it_leaves_a_bundle_a_policy_and_a_page(out, page):
    policy = ExitPolicy.load(out / "policy.json")
    assert policy.certificate is not None
    assert load(out / "bundle").policy == policy
    for text in ("transformers, full depth", "static decoder depth 1", "all at first exit", "calibrated exits"):
        assert text in page
    assert "<script" not in page


def test_the_methods_are_in_table_plot_and_settings_if_asked_for(page):
    table = page[page.index("<table>") : page.index("</table>")]
    plot = page[page.index('<svg xmlns="http://www.w3.org/2000/svg"') : page.index("</svg>")]
    for method, label in (("CALM", "CALM"), ("MuE encoder + DEED decoder", "MuE + DEED"), ("patience", "patience")):
        assert f">{method}</td>" in table
        assert f">{label}</text>" in plot
        assert f"<dt>{method}</dt>" in page


def test_the_pictures_shown_are_test_pictures_with_the_bundles_answers(out, page):
    shards = sorted((out / "scenes").glob("test-*.tar"))
    samples = read_samples(shards, "vqa", BadSamples("raise")).samples
    known = {(np.asarray(s.image).tobytes(), s.prompt): s for s in samples}
    cards = re.findall(r"<li><img src=\"data:image/png;base64,([^\"]+)\".*?</li>", page)
    bodies = re.findall(r"<li><img .*?</li>", page)
    assert len(cards) == module.SHOWN
    engine = load(out / "bundle")
    for data, body in zip(cards, bodies, strict=True):
        picture = Image.open(io.BytesIO(base64.b64decode(data)))
        prompt = html.unescape(re.search(r'class="prompt">(.*?)</p>', body)[1])
        sample = known[np.asarray(picture).tobytes(), prompt]
        said = re.search(r'class="answer">(.*?)</p>', body)[1]
        said = html.unescape(re.sub(r"<sub>\d+</sub>|<[^>]*>", "", said)).removesuffix("■").replace("·", "")
        assert said.strip() == engine.answer([picture], [prompt])[0]
        assert ("✓ right" in body) == (said.strip() in sample.references)
        assert f"level\N{NO-BREAK SPACE}{sample.level} " in body


def test_shown_are_easy_and_hard_ones_alike_each_with_its_own_picture():
    rng = np.random.default_rng(0)
    levels = rng.choice([1, 2, 3, 5], 60, p=[0.1, 0.4, 0.2, 0.3]).tolist()
    samples = [Sample(f"s{i}", f"picture {i // 2}", "?", ["a"], None, "vqa", level) for i, level in enumerate(levels)]
    chosen = [samples[i] for i in module.spread(samples, 8)]
    assert Counter(s.level for s in chosen) == {1: 2, 2: 2, 3: 2, 5: 2}
    assert len({s.cluster for s in chosen}) == 8
    assert [s.level for s in chosen] == sorted(s.level for s in chosen)
    assert len(module.spread(samples[:6], 8)) == 3  # there are three pictures
    assert module.spread([], 8) == []


def test_an_interrupted_one_goes_on(out, capsys):
    before = (out / "last.ckpt").stat().st_mtime_ns
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PICTURES", PICTURES)
        patch.setattr(module, "TIMED_SAMPLES", 2)
        module.quickstart(out, keep=0.9, seed=0, steps=4)  # all trained already: nothing is trained again
    assert (out / "last.ckpt").stat().st_mtime_ns == before
    assert "calibrated exits" in capsys.readouterr().out.replace("\n", " ")
    assert "CALM" not in (out / "report.html").read_text()  # not asked for
