"""The recipes that read receipts, by commands and small: lines by a VisionEncoderDecoderModel, pages by a UDOP."""

import io
import json
import random
from types import SimpleNamespace

import pytest
import receipts
import yaml
from PIL import Image
from runs import load_run

from lightning_mue.benchmark.exam import Exam
from lightning_mue.benchmark.policies import CALIBRATED, FIRST, FULL
from lightning_mue.checkpoint import load_checkpoint
from lightning_mue.policy import ExitPolicy, ExitRule
from tests.data.conftest import write_tar
from tests.runs import ROOT, mue

SHOPS, COUNTS = ("SUN", "MOON", "STAR BAR"), {"train": 36, "val": 12}


def record(name, rng):
    """Return a receipt that is both: a line to read, and a page with questions."""
    shop, total = rng.choice(SHOPS), f"{rng.randrange(100)}.{rng.randrange(10)}0"
    lines = [(shop, [100, 20, 900, 60]), (f"TOTAL {total}", [50, 700, 400, 740])]
    asked = (("where ?", shop), ("how much ?", total))
    return {
        "id": f"{name}-00",
        "refs": [shop],
        "words": [{"text": text, "box": box} for text, box in lines],
        "qa": [{"text": question, "refs": [answer]} for question, answer in asked],
    }


def picture(rng):
    buffer = io.BytesIO()
    Image.new("RGB", (64, 16), tuple(rng.randrange(256) for _ in range(3))).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("pages"), random.Random(0)
    for split, count in COUNTS.items():
        names = [f"{split}{k}" for k in range(count)]
        members = [
            (f"{n}.{kind}", data) for n in names for kind, data in (("png", picture(rng)), ("json", record(n, rng)))
        ]
        write_tar(folder / f"{split}-000.tar", members)
    return folder


def small_lines(backbone):
    backbone["encoder"] |= {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
    backbone["decoder"] |= {"d_model": 32, "decoder_layers": 3, "decoder_ffn_dim": 48}
    return {"vision": [1], "decoder": [1, 2]}


def small_pages(backbone):
    backbone |= {"vocab_size": 60, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_decoder_layers": 3}
    return {"encoder": [1], "decoder": [1, 2]}


@pytest.fixture(
    scope="module", params=[("sroie_lines_trocr", small_lines), ("sroie_docs", small_pages)], ids=["lines", "pages"]
)
def run(request, tmp_path_factory, pages):
    """A folder with a recipe made small, its checkpoint and its policy."""
    (name, shrink), folder = request.param, tmp_path_factory.mktemp("receipts")
    recipe = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())
    exits = shrink(recipe["model"]["backbone"]) | {"adapter_width": 8, "gate_width": 8, "shortlist": 16}
    recipe["model"] |= {"exits": exits, "early_after": 0.0}
    recipe["model"]["backbone"]["generation_config"]["max_new_tokens"] = 4
    recipe["data"] |= {"train": str(pages), "batch_size": 8, "eval_batch_size": 8, "holdout": 0.5}
    recipe["data"] |= {"vocab_size": 60} if name == "sroie_docs" else {}
    recipe["trainer"] |= {"max_epochs": 2, "accelerator": "cpu", "default_root_dir": str(folder), "logger": False}
    recipe["trainer"] |= {"enable_progress_bar": False, "enable_model_summary": False}
    recipe["trainer"]["callbacks"][0]["init_args"] = {"keep": 0.3, "metric": "consistency", "latency_repeats": 2}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    mue("fit", "-c", folder / "recipe.yaml")
    mue("calibrate", "-c", folder / "recipe.yaml")
    return folder


def test_a_recipe_gives_a_bundle_that_answers(run, pages, tmp_path, capsys):
    assert (run / "policy.json").is_file()
    mue("freeze", "--ckpt_path", run / "last.ckpt", "--out", tmp_path / "bundle")
    (tmp_path / "page.png").write_bytes(picture(random.Random(1)))
    (tmp_path / "page.json").write_text(json.dumps(record("p", random.Random(1))["words"]))
    words = ("--words", tmp_path / "page.json", "--prompt", "where ?")
    given = words if load_run(run / "last.ckpt")[1].hparams["task"] == "document" else ()
    capsys.readouterr()
    mue("generate", tmp_path / "bundle", "--image", tmp_path / "page.png", *given)
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_the_table_of_receipts_tells_lines_apart(run):
    module, data = load_run(run / "last.ckpt")
    data.setup("test")
    exam = Exam.of(module.model, data, "exact_text")
    leaves = ExitPolicy({"decoder": ExitRule.static(2)})
    args = SimpleNamespace(runtime=None, timed_samples=2, repeats=1, threads=1, name="small", metric="exact_text")
    found, ran = receipts.read(exam, leaves, args)
    assert ran == "torch float32"
    assert {FULL, FIRST, CALIBRATED, "static decoder depth 1", "static decoder depth 2"} == set(found)
    assert found[CALIBRATED].answers.texts == found["static decoder depth 2"].answers.texts
    assert all(one.encoder_ms > 0 and one.decoder_ms > 0 for one in found.values())
    assert found[CALIBRATED].answers.mean_depths["decoder"] == 2
    text = receipts.page(args, found, exam, leaves, ran)
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {FULL} "))
    assert "1.000 ± 0.000" in line
    assert text.count("\n| ") == 2 + len(found)


def test_a_checkpoint_is_read_without_its_recipe(run):
    _, processor = load_checkpoint(run / "last.ckpt")
    assert processor.decode(processor.labels(["SUN"])) == ["SUN"]
