"""A project as a user writes it; exits, deep supervision, calibration and a bundle come by callbacks alone."""

import difflib
import importlib.util

import lightning as L
import pytest
import torch

import lightning_mue as mue
from lightning_mue.exits import attached

PLAIN = """\
import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from tests import zoo


class Captioner(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = zoo.tiny_florence2()

    def training_step(self, batch, batch_idx):
        return self.net(**batch).loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.net(**batch).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def make_loader(count, seed=0):
    columns = zoo.inputs("florence2", count, seed)
    columns["labels"] = torch.randint(5, 90, (count, 4), generator=torch.Generator().manual_seed(seed))
    columns["labels"][::2, 3:] = -100
    return DataLoader([{name: column[i] for name, column in columns.items()} for i in range(count)], batch_size=6)


def make_trainer(root, **options):
    callbacks = [ModelCheckpoint(root, "{step}", save_top_k=-1, save_on_train_epoch_end=True)]
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(default_root_dir=root, callbacks=callbacks, **quiet, **options)
"""

WITH_CALLBACKS = PLAIN.replace(
    "\nfrom tests import zoo\n",
    "\nimport lightning_mue as mue\nfrom tests import zoo\n",
).replace(
    "    quiet = {",
    '    callbacks += [mue.MultiExitSupervision("net", exits={"vision": [1, 2], "encoder": [1], "decoder": [1, 3]})]\n'
    "    callbacks += [mue.CalibrateExits(keep=0.05, max_new_tokens=4, latency_repeats=1), mue.LogExitDepth()]\n"
    "    quiet = {",
)

STEPS, EPOCH = 6, 3


class SeedEachStep(L.Callback):
    """Dropout draws the same in a run that was resumed: Lightning does not restore the generator."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        torch.manual_seed(trainer.global_step)


class StopAfterEpoch(L.Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = True


def project(text, folder):
    path = folder / "captioner.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location("captioner", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fit(text, folder, *callbacks, ckpt_path=None, seed=0):
    """Run the project's ``fit``; return its module, its trainer and the last checkpoint."""
    code = project(text, folder)
    torch.manual_seed(seed)
    module = code.Captioner()
    trainer = code.make_trainer(folder, max_steps=STEPS)
    trainer.callbacks[:0] = [SeedEachStep(), *callbacks]
    trainer.fit(module, code.make_loader(6 * EPOCH), code.make_loader(6), ckpt_path=ckpt_path)
    return module, trainer, max(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    done = fit(WITH_CALLBACKS, folder)
    assert not (folder / "policy.json").exists()  # `fit` certifies nothing
    assert done[1].callback_metrics["exit_depth/decoder"] == 5
    return done


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    return fit(PLAIN, tmp_path_factory.mktemp("plain"))


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_at_most_five_lines_differ():
    lines = difflib.unified_diff(PLAIN.splitlines(), WITH_CALLBACKS.splitlines(), n=0, lineterm="")
    changed = [line for line in list(lines)[2:] if line[0] in "+-"]
    assert 0 < len(changed) <= 5


def test_the_checkpoint_is_the_projects_own(run, plain_run, tmp_path):
    module, _, path = run
    saved, plain = (torch.load(p, weights_only=True) for p in (path, plain_run[2]))
    assert saved["state_dict"].keys() == plain["state_dict"].keys()
    loaded = project(PLAIN, tmp_path).Captioner.load_from_checkpoint(path)  # strictly
    trained = module.state_dict()
    assert_equal(loaded.state_dict(), {name: trained[name] for name in loaded.state_dict()})
    assert any("mue_exits" in name for name in trained)
    assert not torch.equal(trained["net.lm_head.weight"], plain["state_dict"]["net.lm_head.weight"])


def test_every_part_of_the_exits_was_trained(run, tmp_path):
    before = project(PLAIN, tmp_path).Captioner()
    mue.MultiExitSupervision("net", exits=attached(run[0].net).config).setup(run[1], before, "fit")
    after = dict(attached(run[0].net).named_parameters())
    moved = [name for name, p in attached(before.net).named_parameters() if not torch.equal(p, after[name])]
    # Vision and encoder exits are drawn at random, and only in later steps; the decoder's learn in every step.
    assert {name for name in after if "decoder" in name} <= set(moved)
    assert any("vision" in name or "encoder" in name for name in moved)


def test_resumed_training_is_bit_equal(run, tmp_path):
    whole, trainer, path = run
    _, _, half = fit(WITH_CALLBACKS, tmp_path, StopAfterEpoch())
    assert torch.load(half, weights_only=True)["global_step"] == EPOCH
    again, resumed, end = fit(WITH_CALLBACKS, tmp_path, ckpt_path=half, seed=1)
    assert resumed.global_step == trainer.global_step == STEPS
    assert_equal(again.state_dict(), whole.state_dict())
    assert_equal(dict(again.net.mue_exits.state_dict()), dict(whole.net.mue_exits.state_dict()))
    states = [torch.load(p, weights_only=True)["optimizer_states"][0]["state"] for p in (end, path)]
    assert states[0].keys() == states[1].keys()
    for index in states[1]:
        assert_equal(states[0][index], states[1][index])


def test_validate_calibrates_and_the_bundle_gives_the_same_tokens(run, tmp_path, steady_clock):
    _, _, path = run
    code = project(WITH_CALLBACKS, tmp_path)
    module = code.Captioner()
    trainer = code.make_trainer(tmp_path / "validate")
    loader = code.make_loader(60, seed=1)
    (results,) = trainer.validate(module, loader, ckpt_path=path, verbose=False)
    policy = mue.ExitPolicy.load(path.parent / "policy.json")
    certificate = policy.certificate
    assert (certificate.kind, certificate.metric, certificate.decode["max_new_tokens"]) == (
        "certified",
        "consistency",
        4,
    )
    assert not policy.is_full_depth
    assert "samples are taken as independent" in certificate.note
    assert "selection_reused" in certificate.note
    assert 0 < certificate.evidence[0].n == certificate.evidence[0].clusters < 60
    for stream, layers in (("vision", 4), ("encoder", 4), ("decoder", 5)):
        assert 1 <= results[f"exit_depth/{stream}"] <= layers

    mue.freeze(module.net, policy, tmp_path / "bundle")
    bundle = mue.load(tmp_path / "bundle")
    engine = mue.ExitEngine(module.net, policy)
    left_early = 0
    for batch in loader:
        expected = engine.generate(**batch)
        found = bundle.generate(**batch)
        assert torch.equal(found.sequences, expected.sequences)
        left_early += sum(int((depth < 4).sum()) for depth in found.exit_depths.values())
    assert left_early

    # Without a Trainer: the plain project's weights, and the exits of the same file.
    plain = project(PLAIN, tmp_path).Captioner.load_from_checkpoint(path)
    mue.load_exits(plain.net, path)
    again = mue.ExitEngine(plain.net, policy)  # the policy's fingerprint is that of these weights too
    assert torch.equal(again.generate(**batch).sequences, expected.sequences)
