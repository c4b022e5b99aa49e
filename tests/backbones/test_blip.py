"""BLIP: what its own calls mean, whose settings are obeyed, what is refused, and a shape that the zoo has not."""

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import BlipConfig, BlipForConditionalGeneration, BlipForQuestionAnswering

import lightning_mue as mue
from lightning_mue.backbones import backbone_config, build_backbone, view
from lightning_mue.callbacks.supervised_call import read_call
from lightning_mue.exits import attached
from lightning_mue.inference import ExitEngine
from lightning_mue.policy import ExitPolicy
from lightning_mue.training import Supervision
from lightning_mue.training.depths import Step
from lightning_mue.training.objective import objective
from lightning_mue.training.supervised import supervise
from tests import reference, zoo

NAMES = ["blip", "blip_vqa"]


def own_call(name, prompt=0):
    """A call of the model's own forward: texts begin with the start token, and prompts and padding do not count."""
    g = torch.Generator().manual_seed(4)
    ids = torch.cat([torch.full((3, 1), zoo.START), torch.randint(5, zoo.VOCABULARY, (3, 7), generator=g)], 1)
    labels, ids[1, 6:] = ids.clone(), zoo.PAD
    labels[1, 6:] = -100
    labels[0, : 1 + prompt] = -100
    call = {k: v for k, v in zoo.inputs(name, 3).items() if k != "attention_mask"}  # transformers reads padding anyway
    return call | {"labels": labels, "decoder_input_ids" if name == "blip_vqa" else "input_ids": ids}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prompt", [0, 3])
def test_full_depth_has_the_loss_of_the_models_own_call(name, prompt):
    model, call = zoo.make(name), own_call(name, prompt)
    inputs, labels = read_call(model, view(model), call)
    assert ("decoder_prompt" in inputs) == bool(prompt)
    found = supervise(view(model), attached(model), inputs, labels, {}).last.loss
    torch.testing.assert_close(found, model(**call).loss)


def test_labels_alone_are_what_an_answer_reads():
    """So transformers' documentation trains it; padding then counts."""
    model, call = zoo.make("blip_vqa"), own_call("blip_vqa")
    call["labels"] = call.pop("decoder_input_ids")
    inputs, labels = read_call(model, view(model), call)
    found = supervise(view(model), attached(model), inputs, labels, {}).last.loss
    torch.testing.assert_close(found, model(**call).loss)


@pytest.mark.parametrize("name", NAMES)
def test_a_project_learns_exits_from_its_own_call(name, tmp_path):
    call = own_call(name, prompt=2)

    class Project(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = zoo.make(name, exits=False)

        def training_step(self, batch, batch_idx):
            return self.net(**batch).loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    module = Project()
    expected = module.net(**call).loss.item()
    quiet = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    how = {"accelerator": "cpu", "devices": 1, "max_steps": 1, "default_root_dir": tmp_path}
    learns = mue.MultiExitSupervision("net", {"vision": [1], "decoder": [2]})
    trainer = L.Trainer(callbacks=[learns], **how, **dict.fromkeys(quiet, False))
    trainer.fit(module, DataLoader([call], batch_size=None))
    assert trainer.callback_metrics["train/loss_full_depth"].item() == pytest.approx(expected, rel=1e-5)


def test_labels_that_are_other_tokens_are_refused():
    model, call = zoo.make("blip"), own_call("blip")
    call["labels"][2, 3] += 1
    with pytest.raises(ValueError, match="BLIP's `labels` must be the tokens of `input_ids`"):
        read_call(model, view(model), call)


@pytest.mark.parametrize("name", NAMES)
def test_all_that_learns_gets_a_gradient(name):
    """Else distributed training would wait for it."""
    model, tensors = zoo.make(name).train(), zoo.inputs(name, 2)
    labels = torch.randint(5, zoo.VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(3))
    objective(view(model), attached(model), tensors, labels, Step(), Supervision()).total.backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_pictures_of_another_width():
    """Of a module that is given as it is, the decoder's generation config is the one that ``generate`` obeys."""
    torch.manual_seed(0)
    config = zoo.tiny_blip().config
    config.vision_config.hidden_size, config.vision_config.num_attention_heads = 24, 3
    model = BlipForConditionalGeneration(BlipConfig(**config.to_dict())).requires_grad_(False).eval()
    model.text_decoder.generation_config.max_new_tokens = 5
    tensors = zoo.picture_inputs(3)
    assert view(model).decoder.memory_width == 24
    expected = reference.generate(model, tensors)
    assert expected.shape == (3, 6)
    engine = ExitEngine(model, ExitPolicy.full_depth())
    assert engine.generate(**tensors).sequences.tolist() == expected.tolist()
    assert backbone_config(model)["generation_config"]["max_new_tokens"] == 5


def test_the_config_says_which_of_its_models_is_meant():
    asked = zoo.tiny_blip("BlipForQuestionAnswering").config
    model = BlipForQuestionAnswering(BlipConfig(**asked.to_dict() | {"architectures": None}))
    again = build_backbone(backbone_config(model))
    assert isinstance(again, BlipForQuestionAnswering)
    assert again.text_decoder.generation_config is again.generation_config
    assert isinstance(zoo.tiny_blip(), BlipForConditionalGeneration)
    with pytest.raises(ValueError, match=r"`architectures` must be .* got \['BlipForImageTextRetrieval'\]"):
        zoo.tiny_blip("BlipForImageTextRetrieval")


@pytest.mark.parametrize("beams", [1, 3])
def test_the_baseline_does_not_read_a_questions_padding(beams):
    model, tensors = zoo.shared("blip_vqa", 2), zoo.prompted_inputs(4, seed=2)
    assert not tensors["attention_mask"].all()
    expected = reference.generate(model, tensors, num_beams=beams)
    found = view(model).generate(tensors, num_beams=beams, do_sample=False)
    for one, other in zip(found.tolist(), expected.tolist(), strict=True):
        length = 1 + one.index(zoo.END) if zoo.END in one else len(one)
        assert one[:length] == other[:length]


def test_what_cannot_be_read_is_refused():
    model, tensors = zoo.shared("blip_vqa"), zoo.prompted_inputs(2, prompt=65)
    with pytest.raises(ValueError, match="The question has 65 tokens; the text encoder's `max_position_embeddings` is"):
        ExitEngine(model, ExitPolicy.full_depth()).generate(**tensors)
    config = zoo.tiny_blip().config.to_dict()
    config["text_config"]["is_decoder"] = False
    with pytest.raises(TypeError, match="without cross-attention reads no picture; its text config needs"):
        view(BlipForConditionalGeneration(BlipConfig(**config)))
