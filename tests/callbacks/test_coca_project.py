"""A project as a user of open_clip writes it, with open_clip's own ``CoCaLoss``; exits come by callbacks alone."""

import lightning as L
import open_clip
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn.functional import cross_entropy, normalize
from torch.utils.data import DataLoader

import lightning_mue as mue
from lightning_mue.backbones.coca_model import CoCaForConditionalGeneration
from lightning_mue.exits import attached
from tests import zoo

LENGTH, STEPS = 20, 4
START, END = zoo.VOCABULARY - 2, zoo.VOCABULARY - 1
"""Where open_clip's tokenizer has them."""

EXITS = {"vision": [1, 2], "text": [1], "decoder": [3, 4], "adapter_width": 8, "gate_width": 8}
CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 24, "layers": 3, "head_width": 6, "output_tokens": True}
    | {"attentional_pool": True, "attn_pooler_queries": 6, "attn_pooler_heads": 4},
    "text_cfg": {"context_length": LENGTH, "vocab_size": zoo.VOCABULARY, "width": 32, "heads": 4, "layers": 2}
    | {"embed_cls": True, "output_tokens": True},
    "multimodal_cfg": {"context_length": LENGTH, "width": 32, "heads": 4, "layers": 3},
}


class Project(L.LightningModule):
    """Nothing of ours: open_clip's model, its loss and its batch ``(images, texts)``."""

    def __init__(self, as_mapping=False):
        super().__init__()
        torch.manual_seed(0)
        self.net = open_clip.coca_model.CoCa(**CONFIG)
        torch.nn.init.normal_(self.net.text_decoder.text_projection, std=0.3)  # open_clip leaves it as it finds it
        self.loss = open_clip.CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0, pad_id=0)
        self.as_mapping = as_mapping

    def training_step(self, batch, batch_idx):
        images, texts = batch
        loss = sum(self.loss(**self.net(images, texts)))
        return {"loss": loss, "mine": 1} if self.as_mapping else loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", sum(self.loss(**self.net(image=batch[0], text=batch[1]))))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def make_loader(count=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 32, 32, generator=g)
    texts = torch.zeros(count, LENGTH, dtype=torch.long)
    for text in texts:
        words = int(torch.randint(1, LENGTH - 1, (1,), generator=g))
        text[: words + 2] = torch.tensor([START, *torch.randint(5, 90, (words,), generator=g), END])
    return DataLoader([*zip(images, texts, strict=True)], batch_size=6)


def supervision(**options):
    given = {"exits": EXITS, "caption": 2.0, "contrast": 1.0, "gate_weight": 0.0, "early_probability": 0.0}
    return mue.MultiExitSupervision("net", **(given | options))


class Totals(L.Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(outputs["loss"].item())


@pytest.fixture
def first_loss(make_trainer):
    def run(callback=None, module=None, loader=None):
        totals = Totals()
        trainer = make_trainer(*([callback] if callback else []), totals, max_steps=1, limit_val_batches=0)
        trainer.fit(module or Project(), loader or make_loader())
        return totals.seen[0]

    return run


@torch.no_grad()
def terms_by_hand(net, batch):
    """Layer -> cross-entropy of captions, and layer -> contrastive loss, by hooks in open_clip's own forward."""
    states = {}
    for k, block in enumerate([*net.text.transformer.resblocks, *net.text_decoder.cross_attn], 1):
        block.register_forward_hook(lambda _m, _a, h_BTD, k=k: states.update({k: h_BTD}))
    out, text = net(*batch), net.text
    captions = {}
    for k in (3, 4, 5):  # adapters are zero at the start
        logits = net.text_decoder.ln_final(states[k]) @ net.text_decoder.text_projection
        captions[k] = cross_entropy(logits.flatten(0, 1), batch[1][:, 1:].flatten(), ignore_index=0)
    contrasts = {}
    for k in (1, 2):
        embedding = normalize(text.ln_final(states[k][:, -1]) @ text.text_projection, dim=-1)
        contrasts[k] = open_clip.ClipLoss()(out["image_features"], embedding, out["logit_scale"])
    return captions, contrasts


def test_without_exits_the_loss_is_the_projects_own(first_loss):
    assert first_loss(supervision(exits={})) == first_loss()


@pytest.mark.parametrize(
    ("weighting", "weights"),
    [("sum", (1, 1, 1)), ("avg+last", (1 / 4, 1 / 4, 1 / 3)), ("linear", (3 / 5, 4 / 5, 1 / 2))],
)
@pytest.mark.parametrize("as_mapping", [False, True])
def test_the_exits_losses_are_added(first_loss, weighting, weights, as_mapping):
    captions, contrasts = terms_by_hand(Project().net, next(iter(make_loader())))
    plain = first_loss()
    assert plain == pytest.approx(float(2 * captions[5] + contrasts[2]), rel=1e-5)
    a, b, c = weights
    expected = plain + 2 * (a * captions[3] + b * captions[4]) + c * contrasts[1]
    found = first_loss(supervision(weighting=weighting), Project(as_mapping))
    assert found == pytest.approx(float(expected), rel=1e-5)


def test_a_model_with_a_loss_of_its_own_gets_the_same_weights(first_loss):
    """The transformers model around the same CoCa: the objective takes the place of its loss."""

    class Captioner(Project):
        def __init__(self):
            super().__init__()
            self.net = CoCaForConditionalGeneration.wrap(self.net)

        def training_step(self, batch, batch_idx):
            return self.net(pixel_values=batch[0], labels=batch[1][:, 1:].masked_fill(batch[1][:, 1:] == 0, -100)).loss

    captions, contrasts = terms_by_hand(Project().net, next(iter(make_loader())))
    found = first_loss(supervision(weighting="sum"), Captioner())
    assert found == pytest.approx(float(2 * sum(captions.values()) + sum(contrasts.values())), rel=1e-5)


def test_where_pictures_leave_early_the_last_layer_is_not_the_projects_own(first_loss):
    exits = {"vision": [1], "decoder": [], "gate": False}
    torch.manual_seed(0)
    cut, batch = Project().net, next(iter(make_loader()))
    cut.visual.transformer.resblocks = cut.visual.transformer.resblocks[:1]
    captions, contrasts = terms_by_hand(cut, batch)
    early = supervision(exits=exits, early_probability=1.0, early_after=0.0, weighting="sum")
    expected = first_loss() + float(2 * captions[5] + contrasts[2])
    assert first_loss(early) == pytest.approx(expected, rel=1e-5)


def test_it_trains_saves_goes_on_and_calibrates(make_trainer, tmp_path):
    def fit(module, root, ckpt_path=None, **options):
        keep = ModelCheckpoint(root, "{step}", save_top_k=-1, save_on_train_epoch_end=True)
        deep = supervision(gate_weight=1.0, early_probability=1.0, early_after=0.5, distill=0.5)
        trainer = make_trainer(keep, deep, enable_checkpointing=True, limit_val_batches=0, max_steps=STEPS, **options)
        trainer.fit(module, make_loader(6), ckpt_path=ckpt_path)
        return module

    whole, begun = fit(Project(), tmp_path / "a"), attached(fit(Project(), tmp_path / "b", limit_train_batches=0).net)
    assert "training_step" not in vars(whole)
    before = begun.state_dict()
    moved = {name.split(".")[1] for name, p in attached(whole.net).named_parameters() if not p.equal(before[name])}
    assert {"text_1", "decoder_3", "decoder_4"} <= moved
    assert moved & {"vision_1", "vision_2"}
    saved = torch.load(tmp_path / "a" / "step=2.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == Project().state_dict().keys()
    again = fit(Project(), tmp_path / "c", tmp_path / "a" / "step=2.ckpt")
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=0, atol=0)
    calibrate = mue.CalibrateExits(keep=0.05, inputs={"pixel_values": 0}, max_new_tokens=3, latency_repeats=1)
    trainer = make_trainer(supervision(), calibrate)
    trainer.validate(Project(), make_loader(40, 1), ckpt_path=tmp_path / "a" / "step=4.ckpt", verbose=False)
    (found,) = tmp_path.rglob("policy.json")
    assert mue.ExitPolicy.load(found).certificate.metric == "consistency"


def test_text_exits_decompose_no_encoder(make_trainer, recwarn):
    make_trainer(supervision(), max_steps=1, limit_val_batches=0).fit(Project(), make_loader())
    assert not [w for w in recwarn if "decompose" in str(w.message)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:, :-2], "padded to the model's 20 tokens, got 18"),
        (lambda text: text.roll(1, 1), "must begin with the start token, 95"),
    ],
)
def test_texts_that_are_not_open_clips_are_refused(first_loss, change, message):
    loader = make_loader()
    loader.dataset[:] = [(image, change(text[None])[0]) for image, text in loader.dataset]
    with pytest.raises(ValueError, match=message):
        first_loss(supervision(), loader=loader)


def test_steps_and_exits_to_which_nothing_can_be_added_are_refused(first_loss):
    class Silent(Project):
        def training_step(self, batch, batch_idx):
            return {"mine": super().training_step(batch, batch_idx)}

    with pytest.raises(ValueError, match=r"must return its loss.*got \['mine'\]"):
        first_loss(supervision(), Silent())
    with pytest.raises(ValueError, match="Exits of `text` learn from the contrastive loss alone"):
        first_loss(supervision(contrast=0.0))
    with pytest.raises(ValueError, match="`propagate` replaces a step's whole loss"):
        first_loss(supervision(propagate=0.5))


def test_two_models_of_one_project_are_left_as_they_were(make_trainer):
    class Two(Project):
        def __init__(self):
            super().__init__()
            self.other = open_clip.coca_model.CoCa(**CONFIG)
            torch.nn.init.normal_(self.other.text_decoder.text_projection, std=0.3)

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + sum(self.loss(**self.other(*batch)))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    both = [supervision(), mue.MultiExitSupervision("other", exits=EXITS, caption=2.0, contrast=1.0)]
    totals, module = Totals(), Two()
    for callback in both:
        callback.supervision = supervision().supervision
    loader = DataLoader([*make_loader(6).dataset] * 4, batch_size=6)
    make_trainer(*both, totals, max_steps=4, limit_val_batches=0).fit(module, loader)
    assert totals.seen == pytest.approx([totals.seen[0]] * 4)
    assert "training_step" not in vars(module)


def test_a_batch_may_be_passed_over(first_loss):
    class Passing(Project):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 0 else loss

    totals = Totals()
    totals.on_train_batch_end = lambda *given: totals.seen.append(given[2])
    trainer = L.Trainer(max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, limit_val_batches=0)
    trainer.callbacks += [supervision(), totals]
    trainer.fit(Passing(), make_loader())
    assert not totals.seen[0]
    assert totals.seen[1]["loss"] > 0
