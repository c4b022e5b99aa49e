"""The pages: every snippet of Python runs, in the order of its page; commands and links are real."""

import re
import shlex
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import yaml
from PIL import Image
from torch.nn.functional import cross_entropy

import lightning_mue as mue
from lightning_mue import cli
from lightning_mue.policy import ExitPolicy, ExitRule
from tests import zoo
from tests.callbacks.test_multi_exit_supervision import Captioner, make_loader
from tests.runs import ROOT, tiny_recipe

PAGES = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.S | re.M)
EARLY = ExitPolicy({"decoder": ExitRule.static(1)})


def blocks(text, language):
    return [code for found, code in FENCE.findall(text) if found == language]


@pytest.fixture
def given(tmp_path, shards, calibrated, monkeypatch):
    """What the pages take for granted, as small as can be."""
    recipe = yaml.safe_load(Path(tiny_recipe(tmp_path / "recipe.yaml", shards, tmp_path)).read_text())
    backbone = recipe["model"]["backbone"]
    backbone["vision_config"]["depths"] = [3]
    backbone["text_config"] |= {"encoder_layers": 3, "decoder_layers": 4}
    monkeypatch.chdir(calibrated)  # where there is a `bundle`
    quiet = {"accelerator": "cpu", "max_steps": 2, "logger": False, "enable_progress_bar": False, "devices": 1}
    monkeypatch.setattr(L, "Trainer", partial(L.Trainer, **quiet, enable_model_summary=False))
    data = mue.ShardsDataModule(**recipe["data"])
    data.setup("validate")
    florence2 = {"model": zoo.make("florence2"), "policy": EARLY, "inputs": zoo.inputs("florence2", 2)}
    picture = {"picture": Image.new("RGB", (24, 24)), "prompt": "what is left of the red circle ?"}
    return {
        "project.md": {"mue": mue, "cross_entropy": cross_entropy, "Captioner": Captioner, **florence2},
        "training.md": {
            "backbone": backbone,
            "data": data,
            "inputs": next(iter(data.val_dataloader())),
            **picture,
        },
        "certificate.md": {"mue": mue, **picture},
    }


@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if blocks(text, "python")])
def test_snippets_of_python_run(page, given):
    names = given.get(page, {})
    for code in blocks(PAGES[page], "python"):
        exec(compile(code, page, "exec"), names)
    if page == "project.md":
        supervision = mue.MultiExitSupervision("net", exits={"decoder": [1, 2]})
        L.Trainer(callbacks=[supervision], limit_val_batches=0).fit(names["Smoothed"](), make_loader())


def commands(text):
    """Each ``mue`` command of a page, without what is said of it."""
    lines = [line for block in blocks(text, "") for line in block.splitlines()]
    return [line.split("#")[0].split() for line in lines if line.startswith("mue ")]


@pytest.mark.parametrize("page", ["README.md", *PAGES])
def test_commands_are_there(page, capsys):
    text = PAGES.get(page) or (ROOT / page).read_text()
    for _, command, *options in commands(text):
        assert command in cli.LIGHTNING | cli.OWN
        if command in cli.LIGHTNING:
            continue
        what = options[:1] if command in ("data", "policy") else []
        with pytest.raises(SystemExit):
            cli.main([command, *what, "--help"])
        known = capsys.readouterr().out
        for option in options:
            assert not option.startswith("--") or option in known, f"{page}: {shlex.join(options)}"


@pytest.mark.parametrize("page", ["README.md", *PAGES])
def test_links_lead_somewhere(page):
    folder = ROOT if page == "README.md" else ROOT / "docs"
    text = PAGES.get(page) or (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", FENCE.sub("", text)):
        assert target.startswith("http") or Path(folder, target).exists(), f"{page}: {target}"


def test_tests_that_pages_name_are_there():
    named = set(re.findall(r"`(test_\w+)`", "".join(PAGES.values())))
    defined = {
        n for path in ROOT.glob("tests/**/test_*.py") for n in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    assert len(named) > 10
    assert not named - defined


def test_every_page_is_in_the_site():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert {page for entry in nav for page in entry.values()} == set(PAGES)
