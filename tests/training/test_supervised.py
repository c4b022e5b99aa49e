"""Deep supervision against the backbone's own forward."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from lightning_mue.backbones import num_layers, view
from lightning_mue.exits import attached
from lightning_mue.training.depths import sample_depths
from lightning_mue.training.losses import exit_weights
from lightning_mue.training.objective import objective, supervise
from lightning_mue.training.supervised import gate_loss
from tests import zoo


def batch_of(name, size=3):
    labels = torch.randint(5, 90, (size, 6), generator=torch.Generator().manual_seed(3))
    labels[0, 4:] = -100
    return zoo.inputs(name, size), labels


@pytest.mark.parametrize("name", list(zoo.BACKBONES))
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_exit_loss_is_the_shared_head_on_the_adapted_state(name, attention):
    model = zoo.make(name)
    model.set_attn_implementation(attention)
    tensors, labels = batch_of(name)
    backbone, exits = view(model), attached(model)
    results, _, _ = supervise(backbone, exits, tensors, labels, {})
    reference = model(**tensors, labels=labels, output_hidden_states=True)
    last = num_layers(backbone)["decoder"]
    torch.testing.assert_close(results[last].loss, reference.loss)
    for k in zoo.exit_layers(name)["decoder"]:
        h = exits.adapters[f"decoder_{k}"](reference.decoder_hidden_states[k])
        expected = cross_entropy(model.lm_head(h).flatten(0, 1), labels.flatten(), ignore_index=-100)
        torch.testing.assert_close(results[k].loss, expected)


@pytest.mark.parametrize("name", list(zoo.BACKBONES))
@pytest.mark.parametrize("depths", [{}, {"vision": 2}, {"encoder": 1}, {"vision": 1, "encoder": 3}])
def test_every_exit_parameter_gets_a_gradient_in_every_step(name, depths):
    model = zoo.make(name).train()
    tensors, labels = batch_of(name)
    objective(view(model), attached(model), tensors, labels, depths, "avg+last", 1.0).total.backward()
    assert all(p.grad is not None for p in attached(model).parameters())
    for stream, k in depths.items():
        assert any(p.grad.abs().sum() > 0 for p in attached(model).adapters[f"{stream}_{k}"].parameters())


@pytest.mark.parametrize("name", list(zoo.BACKBONES))
def test_gates_do_not_pull_on_the_backbone(name):
    tensors, labels = batch_of(name)
    grads = []
    for weight in (0.0, 5.0):
        model = zoo.make(name)
        objective(view(model), attached(model), tensors, labels, {"encoder": 1}, "sum", weight).total.backward()
        grads.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and "gates" not in n}
        )
    assert all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])


def test_weights_are_those_of_the_papers():
    assert exit_weights("avg+last", (1, 2, 4)) == pytest.approx((1 / 3, 1 / 3, 4 / 3))
    assert exit_weights("sum", (1, 2, 4)) == (1, 1, 1)
    assert exit_weights("linear", (1, 2, 4)) == pytest.approx((1 / 7, 2 / 7, 4 / 7))
    with pytest.raises(ValueError, match=r"avg\+last, sum or linear, got 'mean'"):
        exit_weights("mean", (1, 2))


def test_sampled_depths_depend_on_seed_and_step_alone():
    layers = {"vision": (1, 2), "encoder": (1, 2, 3), "decoder": (1,)}
    draws = [sample_depths(layers, 0.5, 7, step) for step in range(400)]
    assert draws == [sample_depths(layers, 0.5, 7, step) for step in range(400)]
    assert all("decoder" not in d for d in draws)
    share = sum("vision" in d for d in draws) / 400
    assert 0.4 < share < 0.6
    assert {d["encoder"] for d in draws if "encoder" in d} == {1, 2, 3}
    assert all(sample_depths(layers, 0.0, 7, step) == {} for step in range(20))


def test_gate_loss_balances_classes():
    logits = torch.zeros(100)
    safe = torch.zeros(100, dtype=torch.bool)
    safe[:90] = True
    # Gradients of the safe and the unsafe must weigh the same at logit 0.
    logits.requires_grad_()
    gate_loss(logits, safe).backward()
    assert logits.grad[:90].sum().item() == pytest.approx(-logits.grad[90:].sum().item(), rel=1e-5)


@pytest.mark.parametrize("depths", [{}, {"vision": 1}, {"encoder": 2}])
def test_in_distributed_training_no_parameter_is_without_a_gradient(depths, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = zoo.make("florence2").train()
        tensors, labels = batch_of("florence2")
        objective(view(model), attached(model), tensors, labels, depths, "avg+last", 1.0).total.backward()
        assert all(p.grad is not None for p in model.parameters())
    finally:
        torch.distributed.destroy_process_group()


def test_dropout_does_not_blame_an_exit(monkeypatch):
    """Leaving at the last exit of a stream whose last layer is the identity is harmless, whatever dropout draws."""
    model = zoo.make("florence2").train()
    for module in model.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.3
    tensors, labels = batch_of("florence2")
    exits = attached(model)
    monkeypatch.setattr(type(exits), "adapt", lambda self, stream, k, h: h)
    stream = view(model).encoders[1]
    monkeypatch.setattr(type(stream), "layer", lambda self, k, state: state.h_BTD)  # depth changes nothing
    seen = []
    monkeypatch.setattr(
        "lightning_mue.training.objective.gate_loss", lambda logits, safe: seen.append(safe) or logits.sum()
    )
    objective(view(model), exits, tensors, labels, {"encoder": 1}, "avg+last", 1.0)
    assert model.training
    assert seen[-1].all()
