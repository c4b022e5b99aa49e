"""Which checkpoint loads where: made before there were exits, with them or beside them; strictly or not."""

import lightning as L
import pytest
import torch

import lightning_mue as mue
from lightning_mue.exits import attached
from tests.callbacks.test_multi_exit_supervision import EXITS, Captioner, make_loader, supervision


class Attaching(Captioner):
    """Has exits of its own accord."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        mue.attach_exits(self.net, EXITS)


class Adding(Attaching):
    """And trains them without the callback: those of the decoder."""

    def __init__(self):
        super().__init__()
        mue.detach_exits(self.net)
        mue.attach_exits(self.net, EXITS | {"vision": None, "encoder": None})

    def training_step(self, batch, batch_idx):
        outputs = self.net(**batch, output_hidden_states=True)
        return outputs.loss + mue.exit_losses(self.net, outputs, batch["labels"])


class Begun(L.Callback):
    """What a fit begins with, its first step not yet done."""

    def on_train_start(self, trainer, pl_module):
        self.weights = {name: tensor.clone() for name, tensor in pl_module.state_dict().items()}
        self.momentum = [len(optimizer.state) for optimizer in trainer.optimizers]


def with_momentum(module):
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)
    return module


@pytest.fixture
def saved(make_trainer, tmp_path):
    """Kind of checkpoint -> its file, and the module that wrote it; two steps were done."""

    def save(kind):
        module = with_momentum(Attaching() if kind == "in the weights" else Captioner())
        trainer = make_trainer(*([] if kind in ("before", "before, weights alone") else [supervision()]))
        trainer.fit(module, make_loader())
        path = tmp_path / "saved.ckpt"
        trainer.save_checkpoint(path, weights_only="alone" in kind)
        if kind == "in the weights":  # as a project without the callback writes them
            checkpoint = torch.load(path, weights_only=True)
            checkpoint["state_dict"], checkpoint["callbacks"] = module.state_dict(), {}
            torch.save(checkpoint, path)
        return path, module

    return save


def assert_loaded(weights, module, exits):
    """All of the project's weights, and the exits' if they were in the file."""
    for name, tensor in module.state_dict().items():
        if "mue_exits" not in name or exits:
            assert torch.equal(weights[name], tensor), name


MISSING, UNEXPECTED = r"Missing key.*net\.mue_exits\.", r"Unexpected key.*net\.mue_exits\."
LOADED = {
    ("before", Captioner): None,
    ("before", Attaching): MISSING,
    ("by the callback", Captioner): None,
    ("by the callback", Attaching): MISSING,
    ("in the weights", Captioner): UNEXPECTED,
    ("in the weights", Attaching): None,
    ("by the callback, weights alone", Captioner): UNEXPECTED,
    ("by the callback, weights alone", Attaching): None,
}
"""Checkpoint and project -> what a strict `load_from_checkpoint` says."""


@pytest.mark.parametrize(("kind", "project"), LOADED)
def test_load_from_checkpoint(kind, project, saved):
    path, trained = saved(kind)
    if said := LOADED[kind, project]:
        with pytest.raises(RuntimeError, match=f"(?s){said}"):
            project.load_from_checkpoint(path)
    for strict in [False] if said else [True, False]:
        loaded = project.load_from_checkpoint(path, strict=strict)
        if kind == "by the callback":
            mue.load_exits(loaded.net, path)
        own = {name: tensor for name, tensor in loaded.state_dict().items() if "mue_exits" in name}
        in_file = kind == "by the callback" or (kind != "before" and project is Attaching)
        assert bool(own) == (project is Attaching or kind == "by the callback")
        assert_loaded(trained.state_dict() | loaded.state_dict(), trained, in_file)


REFUSED = {
    "before": (ValueError, r"holds no exits of 'net', so its optimizer cannot go on .* call `fit` without `ckpt_path`"),
    "before, weights alone": (KeyError, "checkpoint contains only the model"),
    "by the callback, weights alone": (KeyError, "checkpoint contains only the model"),
}
"""Checkpoint -> what the next `fit` says to its optimizer's state."""


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("project", [Captioner, Attaching])
@pytest.mark.parametrize("kind", ["by the callback", "in the weights", *REFUSED])
def test_fit_goes_on_or_says_why_not(kind, project, strict, saved, make_trainer):
    path, trained = saved(kind)
    module, begun = with_momentum(project()), Begun()
    module.strict_loading = strict
    trainer = make_trainer(begun, supervision(), max_steps=4, limit_val_batches=0)
    if kind in REFUSED:
        error, said = REFUSED[kind]
        with pytest.raises(error, match=said):
            trainer.fit(module, make_loader(24), ckpt_path=path)
        return
    trainer.fit(module, make_loader(24), ckpt_path=path)
    assert trainer.global_step == 4
    assert_loaded(begun.weights, trained, exits=True)
    assert begun.momentum == [len(list(module.parameters()))]


def test_what_was_trained_before_goes_on_as_the_message_says(saved, make_trainer):
    path, trained = saved("before")
    module, begun = with_momentum(Captioner.load_from_checkpoint(path)), Begun()
    make_trainer(begun, supervision(), limit_val_batches=0).fit(module, make_loader())
    assert_loaded(begun.weights, trained, exits=False)
    assert begun.momentum == [0]
    assert attached(module.net) is not None


def test_without_the_callback_its_checkpoint_is_weights(saved, make_trainer):
    """Lightning names what is missing; torch refuses the optimizer's state; the weights load."""
    path, _ = saved("by the callback")
    with (
        pytest.warns(UserWarning, match=r"Please add the following callbacks: .*MultiExitSupervision"),
        pytest.raises(ValueError, match="parameter group"),
    ):
        make_trainer(max_steps=4).fit(with_momentum(Captioner()), make_loader(24), ckpt_path=path)
    again = Captioner.load_from_checkpoint(path)
    make_trainer(limit_val_batches=0).fit(again, make_loader())
    assert attached(again.net) is None


@pytest.mark.parametrize("project", [Captioner, Attaching])
@pytest.mark.parametrize("kind", ["by the callback", "in the weights", "by the callback, weights alone"])
def test_validate_reads_the_exits_wherever_they_are(kind, project, saved, make_trainer):
    path, trained = saved(kind)
    module = project()
    make_trainer(supervision()).validate(module, make_loader(), ckpt_path=path, verbose=False)
    assert_loaded(module.state_dict(), trained, exits=True)


def test_a_project_without_the_callback_goes_on_alone(make_trainer, tmp_path):
    module = with_momentum(Adding())
    trainer = make_trainer(limit_val_batches=0)
    trainer.fit(module, make_loader())
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    again, begun = with_momentum(Adding()), Begun()
    make_trainer(begun, max_steps=4, limit_val_batches=0).fit(again, make_loader(24), ckpt_path=tmp_path / "own.ckpt")
    assert_loaded(begun.weights, module, exits=True)


def test_without_the_callback_what_was_trained_before_lacks_exits(saved, make_trainer):
    path, _ = saved("before")
    with pytest.raises(RuntimeError, match=f"(?s){MISSING}"):
        make_trainer(max_steps=4).fit(with_momentum(Adding()), make_loader(24), ckpt_path=path)
