from types import SimpleNamespace

import pytest
import torch

from lightning_mue.backbones.processor import build_processor
from lightning_mue.data.tokenizer import train_tokenizer
from lightning_mue.exits import attached
from lightning_mue.training import MultiExitModule
from lightning_mue.training.start import let_learn, take_weights
from tests import zoo


def module(**settings):
    torch.manual_seed(1)
    exits = {"vision": [1], "decoder": [1, 2]} | settings.pop("exits", {})
    return MultiExitModule(zoo.tiny_florence2(), exits, **settings)


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    trained = MultiExitModule(zoo.tiny_florence2(), {"vision": [1], "decoder": [1, 2], "adapter_width": 8})
    torch.save({"state_dict": trained.state_dict()}, tmp_path / "a.ckpt")
    return trained, str(tmp_path / "a.ckpt")


def test_weights_that_fit_are_taken_and_the_others_begin_anew(checkpoint):
    trained, path = checkpoint
    fresh, begun = module(), module()  # other adapters: they are wider
    left = take_weights(begun, path)
    for name, weight in begun.state_dict().items():
        other = trained.state_dict().get(name)
        source = other if other is not None and other.shape == weight.shape else fresh.state_dict()[name]
        assert torch.equal(weight, source), name
    assert left
    assert all("adapters" in name for name in left)


def test_what_is_no_checkpoint_or_fits_nowhere_is_refused(tmp_path):
    torch.save({"x": 1}, tmp_path / "b.ckpt")
    with pytest.raises(ValueError, match="must be a Lightning checkpoint"):
        take_weights(module(), tmp_path / "b.ckpt")
    (tmp_path / "d.ckpt").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="must be a Lightning checkpoint"):
        take_weights(module(), tmp_path / "d.ckpt")
    torch.save({"state_dict": {"other": torch.zeros(2)}}, tmp_path / "c.ckpt")
    with pytest.raises(ValueError, match="no weight in"):
        take_weights(module(), tmp_path / "c.ckpt")


def test_another_tokenizer_is_refused(checkpoint, tmp_path):
    trained, _ = checkpoint
    own, other = (train_tokenizer([text], 300) for text in ("red circle", "blue square"))
    torch.save({"state_dict": trained.state_dict(), "ShardsDataModule": {"tokenizer": own}}, tmp_path / "e.ckpt")
    take_weights(module(), tmp_path / "e.ckpt", SimpleNamespace(processor=build_processor(own, 32, 2)))
    with pytest.raises(ValueError, match="another tokenizer"):
        take_weights(module(), tmp_path / "e.ckpt", SimpleNamespace(processor=build_processor(other, 32, 2)))


@pytest.mark.parametrize(
    ("changed", "fits"),
    [
        ({}, True),
        ({"holdout": 0.05}, True),  # part of what was held out before
        ({"train": "others"}, True),
        ({"seed": 1, "holdout": 0.0}, True),
        ({"seed": 1}, False),
        ({"holdout": 0.2}, False),
    ],
)
def test_what_is_held_out_must_not_have_trained_the_checkpoint(checkpoint, tmp_path, changed, fits):
    trained, _ = checkpoint
    before = {"train": "shards", "seed": 0, "holdout": 0.1}
    torch.save({"state_dict": trained.state_dict(), "datamodule_hyper_parameters": before}, tmp_path / "f.ckpt")
    data = SimpleNamespace(hparams=before | changed)
    if fits:
        take_weights(module(), tmp_path / "f.ckpt", data)
        return
    with pytest.raises(ValueError, match=r"samples that were learnt; give both runs the same"):
        take_weights(module(), tmp_path / "f.ckpt", data)


@pytest.mark.parametrize(
    ("learns", "prefix"), [("all", "model."), ("exits", "model.mue_exits."), ("gates", "model.mue_exits.gates.")]
)
def test_only_what_learns_gets_gradients(learns, prefix):
    found = module(learns=learns)
    learning = {name for name, p in found.named_parameters() if p.requires_grad}
    assert learning == {name for name, _ in found.named_parameters() if name.startswith(prefix)}
    assert learning


def test_gates_that_are_not_there_cannot_learn():
    with pytest.raises(ValueError, match="the exits have none"):
        module(learns="gates", exits={"gate": False})
    with pytest.raises(ValueError, match="all, exits or gates, got 'adapters'"):
        let_learn(attached_model(), "adapters")


def attached_model():
    model = zoo.make("florence2")
    assert attached(model) is not None
    return model
