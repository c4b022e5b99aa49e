import copy
import warnings
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import lightning_mue as mue
from lightning_mue.exits import attached
from lightning_mue.training.objective import objective
from tests import zoo

EXITS = {"vision": [1, 2], "encoder": [2], "decoder": [1, 3], "adapter_width": 8, "gate_width": 8}


def supervision(**options):
    return mue.MultiExitSupervision("net", **{"exits": EXITS, **options})


def make_loader(count=12, seed=0, batch_size=6, shuffle=False):
    columns = zoo.inputs("florence2", count, seed)
    columns["labels"] = torch.randint(5, 90, (count, 4), generator=torch.Generator().manual_seed(seed))
    columns["labels"][::2, 3:] = -100
    rows = [{name: column[i] for name, column in columns.items()} for i in range(count)]
    return DataLoader(rows, batch_size, shuffle=shuffle)


class Captioner(L.LightningModule):
    """A project's own; in eval mode, as ``from_pretrained`` leaves a model, so that losses can be compared."""

    def __init__(self, step=lambda net, batch: net(**batch).loss):
        super().__init__()
        self.net = zoo.make("florence2", exits=False)
        self.step = step

    def training_step(self, batch, batch_idx):
        return self.step(self.net, batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.net(**batch).loss)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Losses(L.Callback):
    """What ``training_step`` returned and what was logged, step by step."""

    def __init__(self):
        self.total, self.logged = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.total.append(float(outputs["loss"]))
        self.logged.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("train/")})


@pytest.fixture
def fit(make_trainer):
    def run(callback, module=None, loader=None, **options):
        module, losses = module or Captioner(), Losses()
        trainer = make_trainer(losses, callback, **({"limit_val_batches": 0} | options))
        trainer.fit(module, loader or make_loader())
        return module, losses

    return run


def test_the_loss_is_deep_supervision_of_the_shared_head(fit):
    net, batch = zoo.make("florence2", exits=False), next(iter(make_loader()))
    reference = net(**batch, output_hidden_states=True)

    def loss_at(k):  # adapters are zero at the start
        logits = net.lm_head(reference.decoder_hidden_states[k])
        return cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100).item()

    exits = [loss_at(1), loss_at(3), reference.loss.item()]
    _, losses = fit(supervision(gate_weight=0.0), max_steps=1)
    assert losses.total[0] == pytest.approx(sum(exits) / 3 + reference.loss.item(), rel=1e-5)
    assert losses.logged[0] == pytest.approx({"train/loss_full_depth": reference.loss.item(), "train/gates": 0.0})
    _, losses = fit(supervision(gate_weight=0.0, weighting="sum"), max_steps=1)
    assert losses.total[0] == pytest.approx(sum(exits), rel=1e-5)


def test_streams_are_left_early_after_their_share_of_the_training(fit, monkeypatch):
    seen = []
    spy = lambda *args: seen.append(dict(args[4].depths)) or objective(*args)  # noqa: E731
    monkeypatch.setattr("lightning_mue.callbacks.multi_exit_supervision.objective", spy)
    fit(supervision(early_probability=1.0, early_after=0.5), max_steps=6)
    assert seen[:3] == [{}] * 3
    assert all(depths.keys() == {"vision", "encoder"} for depths in seen[3:])
    assert {depths["encoder"] for depths in seen[3:]} == {2}
    first = list(seen)
    seen.clear()
    fit(supervision(early_probability=1.0, early_after=0.5), max_steps=6)
    assert seen == first
    seen.clear()
    fit(supervision(early_probability=1.0, early_after=0.0), max_epochs=-1, max_steps=1)
    assert seen[0]


def test_steps_with_propagated_states_and_distillation(fit):
    _, losses = fit(supervision(propagate=1.0, early_after=0.0), max_steps=1)
    assert losses.logged[0].keys() == {"train/gates"}
    _, losses = fit(supervision(distill=0.5), max_steps=1)
    assert losses.logged[0]["train/distill"] > 0


def test_without_an_end_the_share_cannot_be_known(fit):
    with pytest.raises(ValueError, match=r"`early_after` is a share .* give the Trainer `max_steps` or `max_epochs`"):
        fit(supervision(), max_steps=-1, max_epochs=-1)


def test_exits_are_trained_and_the_seed_decides_how_they_begin(fit):
    trained = [attached(fit(supervision(seed=seed))[0].net).state_dict() for seed in (0, 0, 1)]
    fresh = Captioner()
    supervision().setup(SimpleNamespace(checkpoint_callbacks=[], strategy=plain_strategy()), fresh, "fit")
    begun = attached(fresh.net).state_dict()
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in begun)
    assert not torch.equal(trained[0]["gates.decoder_1.mlp.1.weight"], trained[2]["gates.decoder_1.mlp.1.weight"])
    assert not torch.equal(
        trained[0]["adapters.decoder_1.change.3.weight"], begun["adapters.decoder_1.change.3.weight"]
    )


def plain_strategy():
    return SimpleNamespace(restore_checkpoint_after_setup=False)


def test_validation_is_that_of_the_plain_project_bit_for_bit(make_trainer):
    losses = []
    for callbacks in ([], [supervision()]):
        trainer = make_trainer(*callbacks)
        losses += trainer.validate(Captioner(), make_loader(), verbose=False)
    assert losses[0] == losses[1]
    module, plain, batch = Captioner(), Captioner(), next(iter(make_loader()))
    make_trainer(supervision(), limit_train_batches=0).fit(module, make_loader())
    for mode in (True, False):
        found, expected = module.net.train(mode), plain.net.train(mode)
        torch.manual_seed(0)
        found = found(**batch)
        torch.manual_seed(0)
        expected = expected(**batch)
        assert torch.equal(found.logits, expected.logits)
        assert torch.equal(found.loss, expected.loss)


def test_between_steps_and_in_validation_inside_fit_the_model_is_untouched(make_trainer):
    seen = {}

    class Compare(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            assert "forward" not in vars(pl_module.net)

        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            copied = copy.deepcopy(pl_module.net)
            mue.detach_exits(copied)
            seen["plain"] = copied(**batch).loss

    module = Captioner()
    trainer = make_trainer(supervision(), Compare(), max_steps=2, val_check_interval=2)
    trainer.fit(module, make_loader(), make_loader(6, 1))
    assert torch.equal(trainer.callback_metrics["val_loss"], seen["plain"])
    assert "forward" not in vars(module.net)


def test_the_project_draws_the_numbers_it_would_draw_without_exits(make_trainer):
    orders = []
    for callbacks in ([], [supervision()]):
        seen = []
        collect = LambdaCallback(on_train_batch_start=lambda t, m, batch, i, seen=seen: seen.append(batch["labels"]))
        torch.manual_seed(3)
        make_trainer(collect, *callbacks).fit(Captioner(), make_loader(shuffle=True))
        orders.append(torch.cat(seen))
    assert torch.equal(*orders)


def test_what_else_the_step_reads_is_the_models_own(fit):
    seen = {}

    def step(net, batch):
        output = net(**batch)
        seen["logits"], seen["own"] = output.logits.detach(), output["logits"].detach()
        loss, logits = output[:2]
        assert torch.equal(loss, output.loss)
        assert torch.equal(output[0], output["loss"])
        assert torch.equal(logits, output[1])
        with torch.no_grad():
            seen["loss"], seen["total"] = net(**batch).loss, output.loss.detach()
        return loss

    batch = next(iter(make_loader()))
    expected = zoo.make("florence2", exits=False)(**batch)
    fit(supervision(), Captioner(step), max_steps=1)
    assert torch.equal(seen["logits"], expected.logits)
    assert torch.equal(seen["own"], expected.logits)
    assert torch.equal(seen["loss"], expected.loss)  # without gradients it is the model's own
    assert seen["total"] > expected.loss


def test_positional_arguments_will_do(fit):
    def step(net, batch):
        return net(batch["input_ids"], batch["pixel_values"], batch["attention_mask"], labels=batch["labels"])[0]

    totals = [fit(supervision(), Captioner(*steps))[1].total for steps in ([], [step])]
    assert totals[0] == totals[1]


def test_a_model_made_in_configure_model(fit):
    class Lazy(Captioner):
        def __init__(self):
            super().__init__()
            self.net = None

        def configure_model(self):
            self.net = self.net or zoo.make("florence2", exits=False)

    assert fit(supervision(), Lazy())[1].total == fit(supervision())[1].total


def test_a_model_deeper_in_the_project(fit):
    class Nested(Captioner):
        def __init__(self):
            super().__init__(lambda model, batch: model.net(**batch).loss)
            self.model = nn.ModuleDict({"net": self.net})
            self.net, self.model.net = self.model, self.net

    _, losses = fit(mue.MultiExitSupervision("model.net", EXITS), Nested())
    assert losses.total == fit(supervision())[1].total


def test_distributed_training(fit, tmp_path):
    strategy = L.pytorch.strategies.DDPStrategy(process_group_backend="gloo")
    try:
        _, losses = fit(supervision(early_after=0.0, early_probability=0.5), strategy=strategy, max_steps=4)
    finally:
        torch.distributed.destroy_process_group()
    assert len(losses.total) == 4


def test_checkpoints_hold_plain_types_and_the_projects_keys(fit, make_trainer, tmp_path):
    keep = ModelCheckpoint(tmp_path, "one")
    module = Captioner()
    module.alias = module.net
    trainer = make_trainer(supervision(), keep, enable_checkpointing=True, limit_val_batches=0)
    trainer.fit(module, make_loader())
    checkpoint = torch.load(tmp_path / "one.ckpt", weights_only=True)
    plain = Captioner()
    plain.alias = plain.net
    assert checkpoint["state_dict"].keys() == plain.state_dict().keys()
    state = checkpoint["callbacks"]["MultiExitSupervision{'model': 'net'}"]
    assert state["weights"].keys() == attached(module.net).state_dict().keys()
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert torch.load(tmp_path / "after.ckpt", weights_only=True)["state_dict"].keys() == plain.state_dict().keys()
    mue.detach_exits(module.net)
    trainer.save_checkpoint(tmp_path / "without.ckpt")
    found = torch.load(tmp_path / "without.ckpt", weights_only=True)
    assert found["state_dict"].keys() == plain.state_dict().keys()
    assert "MultiExitSupervision{'model': 'net'}" not in found["callbacks"]


def test_a_plain_checkpoint_validates_but_does_not_go_on(make_trainer, tmp_path):
    keep = ModelCheckpoint(tmp_path, "plain")
    module = Captioner()
    make_trainer(keep, enable_checkpointing=True, limit_val_batches=0).fit(module, make_loader())
    path = tmp_path / "plain.ckpt"
    with pytest.warns(UserWarning, match="holds no exits of 'net': they stay as they are"):
        make_trainer(supervision()).validate(found := Captioner(), make_loader(), ckpt_path=path, verbose=False)
    mue.detach_exits(found.net)
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in module.state_dict().items())
    with pytest.raises(ValueError, match=r"holds no exits of 'net', so its optimizer .* without `ckpt_path`"):
        make_trainer(supervision(), max_steps=4).fit(Captioner(), make_loader(), ckpt_path=path)


def test_a_checkpoint_of_other_exits_is_refused(make_trainer, tmp_path):
    keep = ModelCheckpoint(tmp_path, "one")
    trainer = make_trainer(supervision(), keep, enable_checkpointing=True, limit_val_batches=0)
    trainer.fit(Captioner(), make_loader())
    other = supervision(exits=EXITS | {"decoder": [1, 2]})
    with pytest.raises(ValueError, match=r"not those of the checkpoint: `decoder` is \[1, 3\] there and \[1, 2\] here"):
        make_trainer(other).validate(Captioner(), make_loader(), ckpt_path=tmp_path / "one.ckpt", verbose=False)


def test_half_of_the_exits_missing_is_not_absence(make_trainer):
    module = Captioner()
    seen = {}

    class Load(L.Callback):
        def on_fit_start(self, trainer, pl_module):
            state = dict(pl_module.state_dict())
            del state["net.mue_exits.gates.decoder_1.mlp.1.weight"]
            with pytest.raises(RuntimeError, match=r"Missing key.*net\.mue_exits\.gates\.decoder_1\.mlp\.1\.weight"):
                pl_module.load_state_dict(state)
            seen["plain"] = pl_module.load_state_dict({k: v for k, v in state.items() if "mue_exits" not in k})

    make_trainer(supervision(), Load(), limit_val_batches=0).fit(module, make_loader())
    assert not seen["plain"].missing_keys
    with pytest.raises(RuntimeError, match=r"Missing key.*mue_exits"):  # after the run nothing would bring them back
        module.load_state_dict(Captioner().state_dict())


def test_weights_alone_are_refused(make_trainer, tmp_path):
    keep = ModelCheckpoint(tmp_path, save_weights_only=True)
    with pytest.raises(ValueError, match=r"`save_weights_only=True` .*`lightning_mue\.save_exits\(model, path\)`"):
        make_trainer(supervision(), keep, enable_checkpointing=True).fit(Captioner(), make_loader())


def test_sharded_weights_are_refused():
    strategy = SimpleNamespace(restore_checkpoint_after_setup=True)
    with pytest.raises(ValueError, match=r"needs whole weights in every process \(one device, or DDP\)"):
        supervision().setup(SimpleNamespace(checkpoint_callbacks=[], strategy=strategy), Captioner(), "fit")


@pytest.mark.parametrize(
    ("callback", "module", "message"),
    [
        (lambda: mue.MultiExitSupervision("model", EXITS), Captioner, r"it has \['net'\], got 'model'"),
        (lambda: mue.MultiExitSupervision("net.lm_head", EXITS), Captioner, "Linear has no view"),
        (lambda: supervision(exits={"decoder": [9]}), Captioner, r"within 1\.\.4 .* got \[9\]"),
        (supervision, lambda: Captioner(lambda net, batch: net(**{**batch, "labels": None}).loss), "needs `labels`"),
        (
            supervision,
            lambda: Captioner(lambda net, batch: net(input_ids=batch["input_ids"], labels=batch["labels"]).loss),
            r"needs \['pixel_values'\]; the model was called with \['input_ids', 'labels'\]",
        ),
        (
            supervision,
            lambda: Captioner(lambda net, batch: net(**batch, decoder_input_ids=batch["labels"].clamp(0)).loss),
            r"would pass over \['decoder_input_ids'\]",
        ),
        (
            supervision,
            lambda: Captioner(lambda net, batch: net.lm_head.weight.sum()),
            r"read no `loss` of `self\.net\(\.\.\.\)` with gradients",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(callback, module, message, fit):
    with pytest.raises((ValueError, TypeError), match=message):
        fit(callback(), module())


def test_exits_that_are_there_must_be_the_same(fit):
    module = Captioner()
    exits = mue.attach_exits(module.net, EXITS)
    fit(supervision(), module)
    assert attached(module.net) is exits  # attached once
    fit(supervision(), module)
    assert attached(module.net) is exits
    with pytest.raises(ValueError, match=r"not those of MultiExitSupervision\('net'\): `vision` is \[1\] there"):
        fit(supervision(exits=EXITS | {"vision": [1]}), module)


def test_an_optimizer_without_the_exits_is_refused(fit):
    class Frozen(Captioner):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net.lm_head.parameters(), lr=0.01)

    with pytest.raises(ValueError, match=r"leaves out parameters of `net\.mue_exits`.*`self\.parameters\(\)`"):
        fit(supervision(), Frozen())


def test_an_unknown_weighting_is_refused_at_once():
    with pytest.raises(ValueError, match=r"`weighting` must be avg\+last, sum or linear, got 'mean'"):
        supervision(weighting="mean")


def test_a_step_that_fails_leaves_the_model_as_it_was(fit):
    def fail(net, batch):
        raise ArithmeticError

    module = Captioner(fail)
    with pytest.raises(ArithmeticError):
        fit(supervision(), module)
    assert "forward" not in vars(module.net)


def test_a_recipe_can_write_it():
    arguments = ["--trainer.callbacks+=lightning_mue.MultiExitSupervision", "--trainer.callbacks.model=net"]
    arguments += ["--trainer.callbacks.exits.decoder=[1,3]", "--trainer.callbacks.weighting=linear"]
    arguments += ["--trainer.callbacks+=lightning_mue.CalibrateExits", "--trainer.callbacks.inputs.pixel_values=image"]
    arguments += ["--trainer.callbacks.sample_id=0", "--trainer.callbacks.cluster=picture"]
    arguments += ["--trainer.callbacks+=lightning_mue.LogExitDepth", "--trainer.callbacks.policy=policy.json"]
    arguments += ["--trainer.logger=false"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LightningCLI's args parameter is intended")
        cli = LightningCLI(
            L.LightningModule, run=False, args=arguments, save_config_callback=None, seed_everything_default=False
        )
    trained, calibrated, logged = cli.trainer.callbacks[:3]
    assert (trained.model, list(trained.exits.decoder), trained.supervision.weighting) == ("net", [1, 3], "linear")
    keys = calibrated.keys
    assert (keys.inputs, keys.sample_id, keys.cluster) == ({"pixel_values": "image"}, 0, "picture")
    assert logged.policy == "policy.json"
