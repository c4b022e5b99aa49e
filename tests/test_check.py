"""`mue check`: it finds nothing wrong with what is right, and names what is wrong."""

import re
import subprocess
import sys
from functools import partial

import pytest
import torch

from lightning_mue.backbones.bart import BartDecoderStream
from lightning_mue.backbones.florence2 import DaViTStream, Florence2View
from lightning_mue.backbones.vision_encoder_decoder import VisionEncoderDecoderView
from lightning_mue.check import check, named
from tests import zoo
from tests.runs import ROOT


def findings(name):
    found = check(lambda: (zoo.make(name, exits=False), partial(zoo.inputs, name)))
    return {finding.name: finding for finding in found}


@pytest.mark.parametrize("name", ["florence2", "coca", "vit_gpt2"])
def test_what_is_right(name):
    assert all(finding.holds for finding in findings(name).values())


@pytest.mark.parametrize(
    ("owner", "method", "wrong", "fails"),
    [
        (Florence2View, "memory_mask", lambda self, inputs: None, "full depth is the model's own greedy decoding"),
        (
            BartDecoderStream,
            "embed",
            lambda self, ids_BT, first: self.embed_at(ids_BT, torch.arange(ids_BT.shape[1])),
            "a decode with a cache is one pass without",
        ),
        (BartDecoderStream, "norm", lambda self, h_BTD: h_BTD * 0 + 1, "full depth is the model's own greedy decoding"),
        (DaViTStream, "layer", lambda self, k, state: state.h_BTD.mean(0, True) + state.h_BTD, "a row of a batch says"),
    ],
)
def test_what_is_wrong_is_named(owner, method, wrong, fails, monkeypatch):
    monkeypatch.setattr(owner, method, wrong)
    found = findings("florence2")
    (failed,) = [finding for name, finding in found.items() if name.startswith(fails)]
    assert failed.holds is False
    assert failed.reason
    assert str(failed).startswith("FAILS")


def test_an_error_of_the_view_is_a_finding(monkeypatch):
    monkeypatch.delattr(VisionEncoderDecoderView, "memory")
    found = findings("donut")  # whose memory is not what the vision stream gives
    assert not any(finding.holds for name, finding in found.items() if "learns" not in name and "attach" not in name)


def test_the_page_about_a_model_of_ones_own(tmp_path):
    page = (ROOT / "docs" / "own_model.md").read_text()
    (tmp_path / "mine.py").write_text("\n".join(re.findall(r"```python\n(.*?)```", page, re.S)))
    command = [sys.executable, "-m", "lightning_mue.cli", "check", "mine:factory"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    words = [line.split()[0] for line in done.stdout.splitlines()]
    assert words == ["ok"] * 9 + ["skipped"]


@pytest.mark.parametrize(("spec", "said"), [("tests.zoo", "module:function"), ("tests.zoo:nothing", "has no function")])
def test_a_factory_that_is_not_there(spec, said):
    with pytest.raises(ValueError, match=said):
        named(spec)
