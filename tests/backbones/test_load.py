"""Backbones from a module, a folder and a config; their views and fingerprints."""

import pytest
import torch
from torch import nn

from lightning_mue.backbones import backbone_config, build_backbone, fingerprint, num_layers, view
from lightning_mue.exits import ExitConfig, attach_exits, detach_exits
from lightning_mue.inference import ExitEngine
from lightning_mue.policy import ExitPolicy
from tests import reference, zoo


@pytest.mark.parametrize("name", list(zoo.BACKBONES))
def test_a_folder_of_transformers_is_a_backbone(name, tmp_path):
    model = zoo.make(name, exits=False)
    model.save_pretrained(tmp_path)
    loaded = build_backbone(str(tmp_path)).eval()  # from_pretrained
    assert fingerprint(loaded) == fingerprint(model)
    tensors = zoo.inputs(name, 2)
    expected = reference.generate(model, tensors)
    assert ExitEngine(loaded, ExitPolicy.full_depth()).generate(**tensors).sequences.tolist() == expected.tolist()


@pytest.mark.parametrize("name", list(zoo.BACKBONES))
def test_a_config_rebuilds_the_same_model(name):
    model = zoo.make(name, exits=False)
    again = build_backbone(backbone_config(model))
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    again.load_state_dict(model.state_dict())
    assert fingerprint(again) == fingerprint(model)
    assert again.generation_config.to_diff_dict() == model.generation_config.to_diff_dict()
    assert num_layers(view(again)) == num_layers(view(model))


@pytest.mark.parametrize("name", ["florence2", "trocr", "vit_gpt2", "blip", "blip2"])
def test_learned_positions_are_drawn_as_asked(name):
    def positions(model):
        return {k: p for k, p in model.named_parameters() if "position" in k or "wpe" in k}

    config = backbone_config(zoo.make(name, exits=False))
    plain, drawn = positions(build_backbone(config)), positions(build_backbone(config | {"position_std": 3.0}))
    assert drawn
    assert name != "vit_gpt2" or len(drawn) == 2
    assert all(2.5 < p.std() < 3.5 and plain[k].std() < 1.5 for k, p in drawn.items())


def test_a_module_is_taken_as_it_is():
    model = zoo.make("florence2", exits=False)
    assert build_backbone(model) is model


def test_one_changed_weight_changes_the_fingerprint():
    model = zoo.make("florence2", exits=False)
    before = fingerprint(model)
    assert fingerprint(model) == before
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-3
    assert fingerprint(model) != before


def test_the_same_weights_seen_otherwise_have_another_fingerprint():
    model = zoo.make("florence2", exits=False)
    seen = []
    for config in ({"encoder": [1]}, {"image": [1]}, {"text": [1]}, {"image": [1], "text_reads_image": True}):
        attach_exits(model, ExitConfig(**config, adapter="none", gate=False))  # no weights of their own
        seen.append(fingerprint(model))
        detach_exits(model)
    assert seen[0] == fingerprint(model)
    assert seen[1] == seen[2]
    assert len(set(seen)) == 3


def test_what_has_no_view_is_named():
    with pytest.raises(TypeError, match="Linear has no view; supported: Florence2ForConditionalGeneration"):
        view(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="needs `model_type`"):
        build_backbone({"d_model": 64})
