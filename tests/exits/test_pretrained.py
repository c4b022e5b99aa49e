"""`save_pretrained` of a model with exits, and what reads it."""

import logging

import pytest
import torch

import lightning_mue as mue
from lightning_mue.backbones import backbone_config, build_backbone
from lightning_mue.exits import attached
from lightning_mue.policy import ExitPolicy
from tests import zoo
from tests.invariants.policies import STEPS, mixed


@pytest.mark.parametrize("name", list(zoo.BACKBONES))
@pytest.mark.parametrize("size", ["5GB", "20KB"])  # one file, or several
def test_exits_come_back(name, size, tmp_path):
    model, tensors = zoo.make(name), zoo.inputs(name, 4)
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert (size == "5GB") == (tmp_path / "model.safetensors").exists()
    again = mue.from_pretrained(tmp_path).eval()
    for key, tensor in attached(model).state_dict().items():
        assert torch.equal(tensor, attached(again).state_dict()[key])
    policy = mixed(model, name, tensors)
    expected, found = (mue.ExitEngine(m, policy).generate(STEPS, **tensors) for m in (model, again))
    assert found.sequences.tolist() == expected.sequences.tolist()


@pytest.mark.parametrize("name", list(zoo.BACKBONES))
def test_transformers_reports_no_unknown_weights(name, tmp_path, caplog, monkeypatch):
    zoo.make(name).save_pretrained(tmp_path)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    mue.from_pretrained(tmp_path)
    assert "mue_exits" not in caplog.text
    build_backbone(str(tmp_path))  # which leaves them out
    assert "mue_exits" in caplog.text


@pytest.mark.parametrize("name", ["florence2", "coca"])
def test_the_same_folder_without_exits(name, tmp_path):
    model, tensors = zoo.make(name), zoo.inputs(name, 2)
    model.save_pretrained(tmp_path)
    plain = build_backbone(str(tmp_path)).eval()
    assert attached(plain) is None
    expected, found = (mue.ExitEngine(m, ExitPolicy()).generate(STEPS, **tensors).sequences for m in (model, plain))
    assert found.tolist() == expected.tolist()
    assert not [key for key in backbone_config(model) if "exits" in key]


def test_what_holds_no_exits_is_refused(tmp_path):
    model = zoo.make("florence2")
    mue.detach_exits(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no exits"):
        mue.from_pretrained(tmp_path)
    other = zoo.make("florence2")
    other.config.mue_exits["adapter_width"] = 4
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="do not fit"):
        mue.from_pretrained(tmp_path)
