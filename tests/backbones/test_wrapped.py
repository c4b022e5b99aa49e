"""Models that PEFT wraps, or whose weights torchao has quantised, go on working."""

import lightning as L
import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import lightning_mue as mue
from lightning_mue.backbones import fingerprint
from lightning_mue.exits import attached
from lightning_mue.policy import ExitPolicy
from tests import zoo
from tests.callbacks.conftest import make_trainer
from tests.callbacks.test_multi_exit_supervision import Captioner, make_loader, supervision
from tests.invariants.policies import STEPS, mixed

__all__ = ["make_trainer"]
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}


def wrapped(name="florence2", **options):
    return get_peft_model(zoo.make(name, exits=False), LoraConfig(**LORA, **options)).eval()


@pytest.mark.parametrize("name", ["florence2", "trocr"])
def test_exits_of_a_model_with_lora(name, tmp_path):
    net, tensors = wrapped(name), zoo.inputs(name, 4)
    expected = net.generate(**tensors, max_new_tokens=STEPS)
    exits = mue.attach_exits(net, zoo.exit_config(name))
    assert attached(net) is exits is attached(net.get_base_model())
    assert mue.ExitEngine(net, ExitPolicy()).generate(STEPS, **tensors).sequences.tolist() == expected.tolist()
    policy = mixed(net, name, tensors)
    found = mue.enable(net, policy)
    ids = net.generate(**tensors, max_new_tokens=STEPS)
    assert ids.tolist() == mue.ExitEngine(net, policy).generate(STEPS, **tensors).sequences.tolist()
    assert found.exit_depths["decoder"].unique().numel() > 1
    mue.disable(net)
    assert net.generate(**tensors, max_new_tokens=STEPS).tolist() == expected.tolist()
    with pytest.raises(ValueError, match=r"`model.merge_and_unload\(\)` gives a plain"):
        mue.freeze(net, ExitPolicy(), tmp_path / "bundle")
    plain = net.merge_and_unload()
    mue.freeze(plain, ExitPolicy(), tmp_path / "bundle")
    assert mue.load(tmp_path / "bundle").generate(STEPS, **tensors).sequences.tolist() == expected.tolist()


def test_adapters_and_exits_lie_side_by_side(tmp_path):
    """What PEFT saves are its own weights alone; both come back onto a plain model."""
    net, tensors = wrapped(), zoo.inputs("florence2", 4)
    mue.attach_exits(net, zoo.exit_config("florence2"))
    policy = mixed(net, "florence2", tensors)
    expected = mue.ExitEngine(net, policy).generate(STEPS, **tensors)
    net.save_pretrained(tmp_path / "adapters")
    mue.save_exits(net, tmp_path / "exits.safetensors")
    again = PeftModel.from_pretrained(zoo.make("florence2", exits=False), tmp_path / "adapters").eval()
    mue.load_exits(again, tmp_path / "exits.safetensors")
    found = mue.ExitEngine(again, policy).generate(STEPS, **tensors)
    assert found.sequences.tolist() == expected.sequences.tolist()
    assert found.exit_depths["decoder"].tolist() == expected.exit_depths["decoder"].tolist()


class Lora(Captioner):
    def __init__(self):
        L.LightningModule.__init__(self)
        self.net, self.step = wrapped(), lambda net, batch: net(**batch).loss


def test_a_project_with_lora_trains_adapters_and_exits_alone(make_trainer, tmp_path):
    module = Lora()
    before = {name: tensor.clone() for name, tensor in module.net.state_dict().items()}
    trainer = make_trainer(supervision(), limit_val_batches=0, max_steps=4)
    trainer.fit(module, make_loader())
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, module.net.state_dict()[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    exits = attached(module.net).state_dict()
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = Lora.load_from_checkpoint(tmp_path / "last.ckpt")  # the project's own weights, without exits
    mue.load_exits(again.net, tmp_path / "last.ckpt")
    assert all(torch.equal(tensor, exits[name]) for name, tensor in attached(again.net).state_dict().items())
    assert fingerprint(again.net) == fingerprint(module.net)


def test_exits_that_the_wrapper_froze_are_named(make_trainer):
    module = Captioner()
    mue.attach_exits(module.net, supervision().exits)
    module.net = get_peft_model(module.net, LoraConfig(**LORA))
    with pytest.raises(ValueError, match="or they are frozen"):
        make_trainer(supervision(), limit_val_batches=0).fit(module, make_loader())


def test_prompts_that_nobody_would_read_are_refused():
    sizes = {"token_dim": 32, "num_layers": 4, "num_attention_heads": 4, "num_transformer_submodules": 1}
    asked = PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=2, **sizes)
    wrapper = get_peft_model(zoo.make("florence2", exits=False), asked)
    with pytest.raises(ValueError, match="prompts are beside the model"):
        mue.attach_exits(wrapper, {"decoder": [1]})


def test_quantised_weights(tmp_path):
    model, tensors = zoo.make("florence2"), zoo.inputs("florence2", 4)
    plain = fingerprint(model)
    quantize_(
        model, Int8WeightOnlyConfig(), lambda module, name: isinstance(module, torch.nn.Linear) and "layers" in name
    )
    expected = model.generate(**tensors, max_new_tokens=STEPS)
    assert mue.ExitEngine(model, ExitPolicy()).generate(STEPS, **tensors).sequences.tolist() == expected.tolist()
    policy = mixed(model, "florence2", tensors)
    assert mue.ExitEngine(model, policy).generate(STEPS, **tensors).exit_depths["decoder"].unique().numel() > 1
    assert fingerprint(model) not in (plain, "")
    with pytest.raises(ValueError, match="a bundle holds plain ones"):
        mue.freeze(model, ExitPolicy(), tmp_path / "bundle")
