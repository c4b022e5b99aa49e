"""``VisionEncoderDecoderModel``: parts that no model of the zoo has, what is refused, and what is never read."""

import lightning as L
import pytest
import torch
from transformers import BertConfig, BertLMHeadModel, VisionEncoderDecoderModel, ViTConfig, ViTModel

import lightning_mue as mue
from lightning_mue.backbones import backbone_config, build_backbone, fingerprint, view
from lightning_mue.exits import attached
from lightning_mue.inference import ExitEngine
from lightning_mue.policy import ExitPolicy
from lightning_mue.training import Supervision
from lightning_mue.training.depths import Step
from lightning_mue.training.objective import objective
from lightning_mue.training.supervised import decoder_states, supervise
from tests import reference, zoo

NAMES = ["trocr", "vit_gpt2", "donut"]
SWIN = {"patch_size": 4, "embed_dim": 8, "depths": [1, 3], "num_heads": [2, 4], "window_size": 8, "drop_path_rate": 0.0}
OTHERS = {
    "sinusoidal": (
        {"model_type": "vit", **zoo.VIT, "hidden_size": 24},
        {"model_type": "trocr", **zoo.BART, "use_learned_position_embeddings": False, "layernorm_embedding": False},
    ),
    "swin_bart": ({"model_type": "swin", **SWIN}, {"model_type": "bart", **zoo.BART}),
}


def make(name):
    torch.manual_seed(0)
    return zoo.tiny_captioner(*OTHERS[name]).requires_grad_(False).eval()


@pytest.mark.parametrize("name", list(OTHERS))
def test_other_parts_give_what_transformers_gives(name, tmp_path):
    plain, tensors = make(name), zoo.picture_inputs(3)
    plain.save_pretrained(tmp_path)
    model = build_backbone(str(tmp_path)).eval()
    backbone, expected = view(model), reference.generate(plain, tensors)
    assert fingerprint(model) == fingerprint(plain)
    ids = torch.randint(5, zoo.VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(1))
    states, logits = reference.decoder_states(plain, tensors, ids)
    found = decoder_states(backbone, reference.memory(plain, tensors), None, ids)
    found[-1] = backbone.decoder.norm(found[-1])
    for mine, theirs in zip(found, states, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(backbone.decoder.head(found[-1]), logits, rtol=1e-4, atol=1e-4)
    for runtime in ("torch", "onnxruntime"):
        engine = ExitEngine(model, ExitPolicy.full_depth(), runtime=runtime)
        assert engine.generate(**tensors).sequences.tolist() == expected.tolist()


def test_sinusoidal_positions_are_those_of_single_steps():
    """Padding has none, wherever it stands; a decode asks for one position after the other."""
    model = make("sinusoidal")
    decoder, ids = reference.decoder(model), torch.tensor([[2, 7, zoo.PAD, 9], [2, zoo.PAD, zoo.PAD, 5]])
    found = view(model).decoder.embed(ids, 3)
    for t in range(4):
        one = ids[:, t : t + 1]
        torch.testing.assert_close(found[:, t : t + 1], decoder.embed_tokens(one) + decoder.embed_positions(one, 3 + t))


@pytest.mark.parametrize("name", NAMES)
def test_full_depth_has_the_models_own_loss(name):
    model, tensors = zoo.make(name), zoo.inputs(name, 3)
    labels = torch.randint(5, zoo.VOCABULARY, (3, 6), generator=torch.Generator().manual_seed(3))
    labels[0, 4:] = -100
    found = supervise(view(model), attached(model), tensors, labels, {}).last.loss
    torch.testing.assert_close(found, model(**tensors, labels=labels).loss)


@pytest.mark.parametrize("name", NAMES)
def test_all_that_learns_gets_a_gradient(name):
    """Else distributed training would wait for it."""
    model, tensors = zoo.make(name).train(), zoo.inputs(name, 2)
    labels = torch.randint(5, zoo.VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(3))
    objective(view(model), attached(model), tensors, labels, Step(), Supervision()).total.backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


class Reader(L.LightningModule):
    """A project whose model is one of these; it notes the losses that its steps see."""

    def __init__(self):
        super().__init__()
        self.net, self.seen = zoo.make("trocr", exits=False), []

    def training_step(self, batch, _index):
        loss = self.net(pixel_values=batch["pixel_values"], labels=batch["labels"]).loss
        self.seen.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize("how", ["project", "module"])
def test_exits_learn(how, tmp_path):
    """In a project as it is, and from a config alone; a step has the objective's loss."""
    torch.manual_seed(0)
    labels = torch.randint(5, zoo.VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(3))
    batch, exits = {**zoo.inputs("trocr", 2), "labels": labels}, {"vision": [2], "decoder": [1, 3], "gate": False}
    if how == "project":
        module = Reader()
        callbacks = [mue.MultiExitSupervision("net", exits, early_probability=0.0)]
    else:
        module, callbacks = mue.MultiExitModule(backbone_config(zoo.make("trocr", exits=False)), exits), []
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = L.Trainer(
        max_steps=1, callbacks=callbacks, enable_checkpointing=False, default_root_dir=tmp_path, **quiet
    )
    trainer.fit(module, torch.utils.data.DataLoader([batch], batch_size=None))
    if how == "module":
        assert trainer.callback_metrics["train/loss"].isfinite()
        return
    found = supervise(view(module.net), attached(module.net), batch, labels, {}).results
    assert module.seen == pytest.approx([sum(found[k].loss.item() for k in found) / 3 + found[5].loss.item()], rel=1e-4)


def test_weights_that_are_never_read_are_no_part_of_the_fingerprint():
    model = zoo.make("vit_gpt2", exits=False)
    before = fingerprint(model), reference.generate(model, zoo.inputs("vit_gpt2", 2)).tolist()
    with torch.no_grad():
        model.encoder.pooler.dense.weight.add_(1)
    assert (fingerprint(model), reference.generate(model, zoo.inputs("vit_gpt2", 2)).tolist()) == before
    with torch.no_grad():
        model.encoder.layernorm.weight.add_(1)
    assert fingerprint(model) != before[0]


def test_the_decoders_config_says_where_answers_begin_and_end():
    config = backbone_config(zoo.make("trocr", exits=False))
    del config["generation_config"]
    settings = view(build_backbone(config)).decode_settings(5)
    assert (settings.start_id, settings.end_ids, settings.pad_id) == (zoo.START, (zoo.END,), zoo.PAD)


def test_parts_without_a_view_are_named():
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    vit = ViTModel(ViTConfig(**small))
    bert = BertLMHeadModel(BertConfig(**small, vocab_size=9, is_decoder=True, add_cross_attention=True))
    with pytest.raises(
        TypeError, match=r"with BertLMHeadModel as its decoder has no view; supported: TrOCRForCausalLM"
    ):
        view(VisionEncoderDecoderModel(encoder=vit, decoder=bert))
    blind = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1}
    model = zoo.tiny_captioner({"model_type": "vit", **zoo.VIT, "hidden_size": 8}, blind)
    with pytest.raises(TypeError, match="without cross-attention reads no picture; its config needs"):
        view(model)
    beit = {"model_type": "beit", **small, "patch_size": 16, "image_size": 32}
    model = zoo.tiny_captioner(beit, {"model_type": "trocr", **zoo.BART})
    with pytest.raises(TypeError, match="with BeitModel as its encoder has no view; supported: ViTModel"):
        view(model)
