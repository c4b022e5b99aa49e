"""How a project trains is its own affair: compiled, checkpointed, on several processes, in lower precision.

What each test runs is a row of the table in docs/project.md.
"""

from functools import partial

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import lightning_mue as mue
from lightning_mue.exits import attached
from tests import ranks, zoo
from tests.callbacks import test_coca_project as coca
from tests.callbacks.conftest import trainer_in
from tests.callbacks.test_multi_exit_supervision import EXITS, Captioner, Losses, make_loader, supervision

STEPS, TOKENS = 4, 4
EAGER = {"backend": "eager"}
"""What Dynamo captures runs as it is: tests ask whether it is captured, once, and not what Inductor makes of it."""


def ours(**options):
    """Streams are left early in every second step; no gate's loss depends on the batch as a whole."""
    return supervision(**{"early_after": 0.0, "early_probability": 0.5, "gate_balance": False} | options)


def logits_of(name):
    """A project whose loss is of logits, smoothed."""

    class Smoothed(Captioner):
        def __init__(self):
            super().__init__()
            self.net = zoo.make(name, exits=False)

        def training_step(self, batch, batch_idx):
            outputs = self.net(**batch)
            loss = cross_entropy(outputs.logits.flatten(0, 1), batch["labels"].flatten(), label_smoothing=0.1)
            return loss + mue.exit_losses(self.net, outputs, batch["labels"])

    return Smoothed()


def train(folder, module, callback=None, loader=None, **options):
    """Run four steps; return the module, the loss of each step and all weights."""
    losses = Losses()
    callbacks = [losses] if callback is False else [losses, callback or ours()]
    trainer = trainer_in(folder, *callbacks, **{"limit_val_batches": 0, "max_steps": STEPS} | options)
    torch.manual_seed(0)
    trainer.fit(module, loader or make_loader())
    return trainer.lightning_module, losses.total, trainer.lightning_module.state_dict()


@pytest.fixture
def fit(tmp_path):
    return partial(train, tmp_path)


@pytest.fixture
def plain(fit):
    """The run on one device, in float32, with nothing compiled."""
    return fit(Captioner())


def assert_equal(found, expected, **close):
    """The same losses, and under whatever names the same weights."""
    assert found[1] == pytest.approx(expected[1], rel=close.get("rtol", 1e-5))
    for mine, theirs in zip(found[2].values(), expected[2].values(), strict=True):
        torch.testing.assert_close(mine, theirs, **({"rtol": 1e-4, "atol": 1e-5} | close))


@pytest.fixture
def assert_it_ships(make_trainer, tmp_path, steady_clock):
    """`validate` certifies what was trained, and the engine leaves early."""

    def check(module):
        calibrate = mue.CalibrateExits(metric="consistency", keep=0.05, max_new_tokens=TOKENS, latency_repeats=1)
        trainer = make_trainer(ours(), calibrate, default_root_dir=tmp_path / "validate")
        trainer.validate(module, make_loader(60, 1), verbose=False)
        policy = mue.ExitPolicy.load(tmp_path / "validate" / "policy.json")
        assert policy.certificate.kind == "certified"
        batch = next(iter(make_loader(6, 2)))
        del batch["labels"]
        found = mue.ExitEngine(module.net, policy).generate(TOKENS, **batch)
        assert any((depths < 4).any() for depths in found.exit_depths.values())

    return check


def compiled(how):
    module = Captioner()
    if how == "wrapped":
        module.net = torch.compile(module.net, **EAGER)
    elif how == "in place":
        module.net.compile(**EAGER, fullgraph=True)
    elif how == "the project":
        return torch.compile(module, **EAGER)
    else:
        for layer in module.net.model.language_model.decoder.layers:
            layer.compile(**EAGER)
    return module


def answers(module, signal="gate", threshold=0.3):
    batch = next(iter(make_loader(6, 2)))
    del batch["labels"]
    policy = mue.ExitPolicy({"decoder": mue.ExitRule(signal, [1, 3], [threshold] * 2)})
    return mue.ExitEngine(module.net, policy).generate(TOKENS, **batch)


@pytest.mark.parametrize("how", ["wrapped", "in place", "the project", "layers"])
def test_compiled(how, fit, plain):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=how != "layers"):  # those meet steps with and without gradients
        found = fit(compiled(how))
    assert bool(torch._dynamo.utils.counters["stats"]["unique_graphs"]) == (how == "layers")
    assert_equal(found, plain)
    assert answers(found[0]).sequences.tolist() == answers(plain[0]).sequences.tolist()


@pytest.mark.slow  # half a minute: validation and decoding are captured
@pytest.mark.parametrize("how", ["wrapped", "layers"])
def test_what_is_compiled_ships(how, assert_it_ships):
    torch._dynamo.reset()
    assert_it_ships(compiled(how))


def test_a_project_compiled_that_adds_exit_losses(fit):
    """Its own forward is compiled, once; the exits' losses are computed beside it."""
    exits = {"encoder": [1, 3], "decoder": [1, 2, 4]}
    words = zoo.inputs("t5", 12)
    words["labels"] = torch.randint(5, 90, (12, 4), generator=torch.Generator().manual_seed(0))
    loader = DataLoader([{name: column[i] for name, column in words.items()} for i in range(12)], 6)
    expected = fit(logits_of("t5"), ours(exits=exits), loader)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = fit(torch.compile(logits_of("t5"), **EAGER), ours(exits=exits), loader)
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] < 10
    assert_equal(found, expected)


@pytest.mark.parametrize("how", ["wrapped", "the project"])
def test_a_compiled_model_that_gives_no_loss(how, fit):
    expected = fit(coca.Project(), coca.supervision(), coca.make_loader())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    module = coca.Project()
    module.net = torch.compile(module.net, **EAGER) if how == "wrapped" else module.net
    module = torch.compile(module, **EAGER) if how == "the project" else module
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = fit(module, coca.supervision(), coca.make_loader())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert_equal(found, expected)


@pytest.mark.parametrize("of_project", [True, False])
def test_one_graph_of_a_step_is_refused(of_project, fit):
    module = Captioner()
    if of_project:
        module = torch.compile(module, **EAGER, fullgraph=True)
    else:
        module.net = torch.compile(module.net, **EAGER, fullgraph=True)
    with pytest.raises(ValueError, match=r"`torch.compile\(..., fullgraph=True\)` makes one graph .*; leave"):
        fit(module)


def test_gradient_checkpointing(fit):
    found = []
    for on in (False, True):
        module = Captioner()
        module.net.train()  # transformers gives states up in training alone
        if on:
            module.net.gradient_checkpointing_enable()
        found.append(fit(module))
    assert found[0][1] == found[1][1]
    assert all(torch.equal(mine, found[0][2][name]) for name, mine in found[1][2].items())
    assert answers(found[1][0]).sequences.tolist() == answers(found[0][0]).sequences.tolist()


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_lower_precision(precision, fit, plain, assert_it_ships):
    module, losses, _ = fit(Captioner(), precision=precision)
    assert losses == pytest.approx(plain[1], rel=0.02)  # deep supervision's: the last layer's own is half of it
    assert losses != plain[1]
    begun = Captioner()
    mue.attach_exits(begun.net, EXITS)
    whole = {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16}[precision]
    assert {p.dtype for p in attached(module.net).parameters()} == {whole}
    if precision == "bf16-mixed":
        assert_it_ships(module)


def even_loader(batch_size, first=0, every=1):
    """All labels count: the mean over a batch is that of the means over its halves."""
    columns = zoo.inputs("florence2", 24)
    columns["labels"] = torch.randint(5, 90, (24, 4), generator=torch.Generator().manual_seed(0))
    return DataLoader(
        [{name: column[i] for name, column in columns.items()} for i in range(first, 24, every)], batch_size
    )


def on_two(folder, project, callback, strategy):
    """Train on two processes, each with every second sample; return how that ended, and what each found."""
    codes, said = ranks.run(folder, 2, partial(_half, folder, project, callback, strategy), timeout=300, fresh=True)
    return codes, said, [folder / f"rank{rank}.pt" for rank in range(2)]


def _half(folder, project, callback, strategy):
    how = {"devices": 2, "strategy": strategy(process_group_backend="gloo"), "use_distributed_sampler": False}
    module, losses, weights = train(folder, project(), callback, even_loader(6, ranks.my_rank(), 2), **how)
    module.trainer.save_checkpoint(folder / "last.ckpt")
    torch.save({"losses": losses, "weights": weights}, folder / f"rank{ranks.my_rank()}.pt")


def test_two_processes_learn_what_one_does_of_the_same_data(fit, tmp_path):
    """An exit that a step passes over is waited for by none."""
    codes, said, files = on_two(tmp_path, Captioner, ours(), DDPStrategy)
    assert codes == [0, 0], said
    expected = fit(Captioner(), ours(), even_loader(12))
    found = [torch.load(file, weights_only=True) for file in files]
    losses = [sum(both) / 2 for both in zip(*(of_rank["losses"] for of_rank in found), strict=True)]
    for of_rank in found:
        assert_equal((None, losses, of_rank["weights"]), expected)
    module = Captioner.load_from_checkpoint(tmp_path / "last.ckpt")
    mue.load_exits(module.net, tmp_path / "last.ckpt")
    assert answers(module).sequences.tolist() == answers(expected[0]).sequences.tolist()


OF_DECODER = {"decoder": [1, 2, 3], "adapter_width": 8, "gate": False}


class Sharded(Captioner):
    """As FSDP2 wants it. Exits, if it attaches any itself, are there before."""

    exits = None

    def configure_model(self):
        if self.exits:
            torch.manual_seed(0)
            mue.attach_exits(self.net, self.exits)
        for layer in [*self.net.model.language_model.decoder.layers, self.net]:
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])


class ShardedWithExits(Sharded):
    exits = OF_DECODER

    def training_step(self, batch, batch_idx):
        outputs = self.net(**batch, output_hidden_states=True)
        return outputs.loss + mue.exit_losses(self.net, outputs, batch["labels"])


class InOneProcess(ShardedWithExits):
    def configure_model(self):
        if attached(self.net) is None:
            torch.manual_seed(0)
            mue.attach_exits(self.net, self.exits)


def test_sharded_by_fsdp2_the_loss_takes_exit_losses(fit, tmp_path):
    sizes = {"data_parallel_size": 2, "tensor_parallel_size": 1}
    strategy = partial(ModelParallelStrategy, save_distributed_checkpoint=False, **sizes)
    codes, said, files = on_two(tmp_path, ShardedWithExits, False, strategy)
    assert codes == [0, 0], said
    _, losses, weights = fit(InOneProcess(), False, even_loader(12))
    found = [torch.load(file, weights_only=True)["losses"] for file in files]
    assert [sum(both) / 2 for both in zip(*found, strict=True)] == pytest.approx(losses, rel=1e-5)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert_equal((None, losses, saved), (None, losses, weights))
    again = InOneProcess.load_from_checkpoint(tmp_path / "last.ckpt")
    assert (answers(again, "confidence", 0.01).exit_depths["decoder"] == 1).any()


def test_sharded_by_fsdp2_the_callback_says_what_to_do(tmp_path):
    codes, said, _ = on_two(tmp_path, Sharded, ours(), ModelParallelStrategy)
    assert codes == [1, 1], said
    words = "got ModelParallelStrategy. Where the model fits on one device, train with `strategy='ddp'`; else"
    assert all(words in text for text in said)


def test_exits_come_before_the_sharding(tmp_path):
    def run():
        with ranks.group():
            net = zoo.make("florence2", exits=False)
            fully_shard(net, mesh=torch.distributed.init_device_mesh("cpu", (2,)))
            mue.attach_exits(net, EXITS)

    codes, said = ranks.run(tmp_path, 2, run)
    assert codes == [1, 1], said
    assert all("is sharded, and exits that come later" in text and "before `fully_shard`" in text for text in said)


class Anew(Captioner):
    """Makes a model whenever Lightning asks, which it does more than once."""

    def configure_model(self):
        self.net = zoo.make("florence2", exits=False)


def test_a_model_that_is_made_anew_is_noticed(fit):
    with pytest.raises(ValueError, match=r"holds a model without them. .* must make it once: `if self.net is None`"):
        fit(Anew())
