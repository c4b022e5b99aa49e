"""Three projects as people write them, and the lines that add exits to each."""

import difflib
import importlib.util
from pathlib import Path

import pytest
import torch

import lightning_mue as mue
from lightning_mue.exits import attached

HERE = Path(__file__).parent
PROJECTS = {"captioner": "net", "reader": "model", "retriever": "net"}
"""Name -> the attribute that holds its model."""


def code(kind, name):
    spec = importlib.util.spec_from_file_location(f"{kind}_{name}", HERE / kind / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(kind, name, root):
    torch.manual_seed(0)
    return code(kind, name).main(root)


@pytest.mark.parametrize("name", PROJECTS)
def test_at_most_five_lines_are_added(name):
    plain, ours = ((HERE / kind / f"{name}.py").read_text().splitlines() for kind in ("plain", "with_exits"))
    changed = [line for line in list(difflib.unified_diff(plain, ours, n=0, lineterm=""))[2:] if line[0] in "+-"]
    changed = [line for line in changed if line[1:].strip()]
    assert 0 < len(changed) <= 5
    assert not any("mue" in line for line in plain)


@pytest.mark.parametrize("name", PROJECTS)
def test_it_trains_calibrates_loads_and_ships(name, tmp_path, steady_clock):
    ours, plain = run("with_exits", name, tmp_path / "ours"), run("plain", name, tmp_path / "plain")
    model, path = getattr(ours, PROJECTS[name]), tmp_path / "ours" / "last.ckpt"
    saved, before = (torch.load(tmp_path / kind / "last.ckpt", weights_only=True) for kind in ("ours", "plain"))
    assert saved["state_dict"].keys() == before["state_dict"].keys() == plain.state_dict().keys()
    policy = mue.ExitPolicy.load(tmp_path / "ours" / "policy.json")
    assert policy.certificate.kind == "certified"
    assert policy.rules
    again = code("plain", name)  # the project without us reads the checkpoint, strictly
    loaded = getattr(again, name.capitalize()).load_from_checkpoint(path)
    net = getattr(loaded, PROJECTS[name])
    assert attached(net) is None
    mue.load_exits(net, path)
    batch = next(iter(again.make_loader(10, 3)))
    inputs = dict(batch) if isinstance(batch, dict) else {"pixel_values": batch[0]}
    expected = mue.ExitEngine(model, policy).generate(4, **inputs)
    assert mue.ExitEngine(net, policy).generate(4, **inputs).sequences.tolist() == expected.sequences.tolist()
    if name != "retriever":  # open_clip's model has no config: `build_backbone` gives it one
        mue.freeze(net, policy, tmp_path / "bundle")
        bundle = mue.load(tmp_path / "bundle").generate(4, **inputs)
        assert bundle.sequences.tolist() == expected.sequences.tolist()
