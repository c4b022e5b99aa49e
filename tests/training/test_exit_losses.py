"""A project makes its loss of logits and adds `exit_losses`: under the callback, and in a loop of its own."""

import pytest
import torch
from torch.nn.functional import cross_entropy

import lightning_mue as mue
from lightning_mue.exits import attached
from lightning_mue.training.supervised import shift_right
from tests import zoo
from tests.callbacks.conftest import make_trainer
from tests.callbacks.test_multi_exit_supervision import Captioner, fit, make_loader, supervision

__all__ = ["fit", "make_trainer"]


def own_loss(logits, labels):
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


def from_logits(net, batch):
    outputs = net(**batch)
    return own_loss(outputs.logits, batch["labels"]) + mue.exit_losses(net, outputs, batch["labels"])


def with_decoder_inputs(net, batch):
    """As a project does that keeps its labels to itself."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    outputs = net(**inputs, decoder_input_ids=shift_right(batch["labels"], zoo.START, zoo.PAD))
    return own_loss(outputs.logits, batch["labels"]) + mue.exit_losses(net, outputs, batch["labels"])


def by_hand(net, batch, layers):
    """Full depth's cross-entropy, and that of exits whose adapters are zero, a quarter of its weight each."""
    found = net(**batch, output_hidden_states=True)
    exits = [own_loss(net.lm_head(found.decoder_hidden_states[k]), batch["labels"]) for k in layers]
    return own_loss(found.logits, batch["labels"]) + sum(exits) / 3 / (1 / 3 + 1)


@pytest.mark.parametrize("step", [from_logits, with_decoder_inputs])
def test_under_the_callback(fit, step):
    net, batch = zoo.make("florence2", exits=False), next(iter(make_loader()))
    module, losses = fit(supervision(gate_weight=0.0), Captioner(step), max_steps=1)
    assert losses.total[0] == pytest.approx(by_hand(net, batch, (1, 3)).item(), rel=1e-5)
    assert all(parameter.grad is not None for parameter in attached(module.net).parameters())


def test_a_step_that_forgets_it_trains_no_exit(fit):
    forgets = Captioner(lambda net, batch: own_loss(net(**batch).logits, batch["labels"]))
    with pytest.raises(ValueError, match=r"adds `lightning_mue\.exit_losses"):
        fit(supervision(), forgets)


def test_in_a_loop_of_ones_own():
    net, batch = zoo.make("florence2", exits=False), next(iter(make_loader()))
    expected = by_hand(net, batch, (1, 3))
    mue.attach_exits(net, {"decoder": [1, 3], "adapter_width": 8, "gate": False})

    def total():
        outputs = net(**batch, output_hidden_states=True)
        return own_loss(outputs.logits, batch["labels"]) + mue.exit_losses(net, outputs, batch["labels"])

    assert total().item() == pytest.approx(expected.item(), rel=1e-5)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(8):
        optimizer.zero_grad()
        total().backward()
        optimizer.step()
    assert total() < 0.7 * expected
    with torch.no_grad():
        assert mue.exit_losses(net, net(**batch), batch["labels"]) == 0
    with pytest.raises(ValueError, match="output_hidden_states=True"):
        mue.exit_losses(net, net(**batch), batch["labels"])


def test_gates_learn_there_too():
    net, batch = zoo.make("florence2", exits=False), next(iter(make_loader()))
    mue.attach_exits(net, {"decoder": [1, 3], "adapter_width": 8, "gate_width": 8})
    mue.exit_losses(net, net(**batch, output_hidden_states=True), batch["labels"]).backward()
    assert all(parameter.grad.any() for parameter in attached(net).gates.parameters() if parameter.ndim > 1)


def test_with_and_without_exits():
    net, batch = zoo.make("florence2", exits=False), next(iter(make_loader()))
    assert mue.exit_losses(net, net(**batch), batch["labels"]) == 0
    mue.attach_exits(net, {"vision": [1], "decoder": [1], "adapter_width": 8, "gate_width": 8})
    with pytest.raises(ValueError, match=r"Exits of \['vision'\] learn from streams that are left early"):
        mue.exit_losses(net, net(**batch, output_hidden_states=True), batch["labels"])
