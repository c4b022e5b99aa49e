"""The objective of a step: what is added up, what gets a gradient, what the gates are told."""

import itertools
import math

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from lightning_mue.backbones import view
from lightning_mue.exits import attached
from lightning_mue.inference import ExitEngine
from lightning_mue.policy import ExitPolicy, ExitRule
from lightning_mue.training import Supervision, exit_weights
from lightning_mue.training.depths import Step
from lightning_mue.training.gates import own_labels
from lightning_mue.training.objective import objective
from lightning_mue.training.supervised import decoder_exits, encode, run_streams, supervise
from tests import reference, zoo
from tests.training.by_hand import token_by_token
from tests.training.test_supervised import BACKBONES, agreeable, batch_of

PLAIN = Supervision(gate_weight=0.0)


def run(model, tensors, labels, step=None, how=PLAIN):
    return objective(view(model), attached(model), tensors, labels, step or Step(), how)


def gradients(model, tensors, labels, step=None, how=PLAIN):
    model.zero_grad()
    run(model, tensors, labels, step, how).total.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def some_depths(name):
    """No stream left early, each one alone at its first exit, and all at once."""
    first = {stream: layers[0] for stream, layers in zoo.exit_layers(name).items() if stream != "decoder"}
    return [{}, *({stream: k} for stream, k in first.items()), first]


DEPTHS = [(name, depths) for name in BACKBONES for depths in some_depths(name)]
STEPS = {"plain": {}, "own path": {"own_path": True}, "propagated states": {"token_seed": 5}}


@pytest.mark.parametrize(("name", "depths"), DEPTHS)
@pytest.mark.parametrize("kind", list(STEPS))
def test_every_exit_parameter_gets_a_gradient_in_every_step(name, depths, kind):
    model = zoo.make(name).train()
    tensors, labels = batch_of(name)
    step = Step(depths, **STEPS[kind])
    run(model, tensors, labels, step, Supervision(distill=0.5)).total.backward()
    exits = attached(model)
    assert all(p.grad is not None for p in exits.parameters())
    for stream, k in depths.items():
        assert any(p.grad.abs().sum() > 0 for p in exits.adapters[f"{stream}_{k}"].parameters())
        learns = any(p.grad.abs().sum() > 0 for p in exits.gates[f"{stream}_{k}"].parameters())
        assert learns == (len(depths) == 1)
    first = zoo.exit_layers(name)["decoder"][0]
    decoder_learns = any(p.grad.abs().sum() > 0 for p in exits.gates[f"decoder_{first}"].parameters())
    assert decoder_learns == (kind != "propagated states")
    assert model.training


def count_checkpoints(model):
    """Note each layer whose states are given up, to be computed again in the backward pass."""
    seen = []
    for module in model.modules():
        if (own := getattr(module, "_gradient_checkpointing_func", None)) is not None:
            module._gradient_checkpointing_func = lambda *args, own=own: seen.append(args) or own(*args)
    return seen


@pytest.mark.parametrize("name", [name for name in BACKBONES if name != "coca"])  # open_clip's has a switch of its own
def test_gradient_checkpointing_changes_no_gradient(name):
    model = zoo.make(name).train()
    tensors, labels = batch_of(name)
    torch.manual_seed(1)
    expected = gradients(model, tensors, labels)
    model.activation_checkpointing_enable()
    seen = count_checkpoints(model)
    torch.manual_seed(1)  # dropout
    found = gradients(model, tensors, labels)
    assert len(seen) >= view(model).decoder.num_layers
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], gradient) for n, gradient in expected.items())


@pytest.mark.parametrize("kind", list(STEPS))
@pytest.mark.parametrize("depths", [{}, {"vision": 1}, {"encoder": 2}])
def test_in_distributed_training_no_parameter_is_without_a_gradient(depths, kind, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = zoo.make("florence2").train()
        tensors, labels = batch_of("florence2")
        run(model, tensors, labels, Step(depths, **STEPS[kind]), Supervision(distill=0.5)).total.backward()
        assert all(p.grad is not None for p in model.parameters())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("kind", ["plain", "own path"])
def test_gates_do_not_pull_on_the_backbone(name, kind):
    tensors, labels = batch_of(name)
    stream = next(stream for stream in ("encoder", "text", "vision") if stream in zoo.exit_layers(name))
    step, grads = Step({stream: 1}, **STEPS[kind]), []
    for weight in (0.0, 5.0):
        found = gradients(zoo.make(name), tensors, labels, step, Supervision("sum", gate_weight=weight))
        grads.append({n: g for n, g in found.items() if "gates" not in n})
    assert all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])


@pytest.mark.parametrize("weighting", ["avg+last", "sum", "linear"])
def test_the_total_is_what_the_settings_add_up(weighting):
    model = zoo.make("florence2")
    tensors, labels = batch_of("florence2")
    found = supervise(view(model), attached(model), tensors, labels, {}, distill_temperature=2.0)
    weights = dict(zip(found.results, exit_weights(weighting, tuple(found.results)), strict=True))
    deep = sum(weights[k] * r.loss for k, r in found.results.items())
    apart = sum(r.divergence for r in list(found.results.values())[:-1]) / 4
    losses = run(
        model, tensors, labels, None, Supervision(weighting, gate_weight=0.3, distill=0.7, distill_temperature=2.0)
    )
    torch.testing.assert_close(losses.total, deep + 0.7 * apart + 0.3 * losses.gates)
    torch.testing.assert_close(losses.distill, apart.detach())
    assert losses.gates > 0


def test_distillation_teaches_early_exits_and_not_the_last():
    model = zoo.make("florence2")
    tensors, labels = batch_of("florence2")
    without, taught = (
        gradients(model, tensors, labels, how=Supervision(gate_weight=0.0, distill=d)) for d in (0.0, 3.0)
    )
    changed = {n for n in taught if not torch.allclose(taught[n], without[n], rtol=1e-5, atol=1e-7)}
    for k in range(1, 5):
        assert any(n.startswith(f"mue_exits.adapters.decoder_{k}.") for n in changed)
        assert any(n.startswith(f"model.language_model.decoder.layers.{k - 1}.") for n in changed)
    assert not any(n.startswith("model.language_model.decoder.layers.4.") for n in changed)


@pytest.mark.parametrize("distill", [0.0, 1.0])
@pytest.mark.parametrize("kind", list(STEPS))
def test_autocast_loses_no_gradient(distill, kind):
    """Weights that were first cast where no gradient is taken must not stay so."""
    model = zoo.make("florence2")
    tensors, labels = batch_of("florence2")
    step, how = Step(**STEPS[kind]), Supervision(distill=distill)
    exact = gradients(model, tensors, labels, step, how)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        total = run(model, tensors, labels, step, how).total
    total.backward()
    for name, parameter in model.named_parameters():
        if name in exact and exact[name].norm() > 1e-3:
            assert 0.2 < parameter.grad.norm() / exact[name].norm() < 5, name


def test_dropout_does_not_blame_an_exit(monkeypatch):
    """Leaving at the last exit of a stream whose last layer is the identity is harmless, whatever dropout draws."""
    model = zoo.make("florence2").train()
    dropout(model, 0.3)
    tensors, labels = batch_of("florence2")
    monkeypatch.setattr(type(attached(model)), "adapt", lambda self, stream, k, h: h)
    stream = view(model).encoders[1]
    monkeypatch.setattr(type(stream), "layer", lambda self, k, state: state.h_BTD)  # depth changes nothing
    seen = watch_gate_loss(monkeypatch)
    run(model, tensors, labels, Step({"encoder": 1}), Supervision())
    assert model.training
    assert seen[-1][1].all()


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("stream", ["vision", "encoder", "image", "text"])
def test_a_stream_gate_is_told_whether_any_token_changes(name, stream, monkeypatch):
    if stream not in zoo.exit_layers(name):
        pytest.skip("no such stream")
    model, verdicts = zoo.make(name), []
    tensors, labels = batch_of(name, 8)
    seen = watch_gate_loss(monkeypatch)
    for k in zoo.exit_layers(name)[stream]:
        run(model, tensors, labels, Step({stream: k}), Supervision(gate_balance=k != 1))
        tokens = [
            supervise(view(model), attached(model), tensors, labels, depths).last.tokens_N
            for depths in ({stream: k}, {})
        ]
        ends = (labels >= 0).sum(1).cumsum(0)[:-1]
        same = [torch.equal(a, b) for a, b in zip(*(t.tensor_split(ends) for t in tokens), strict=True)]
        logits, safe, balance = seen[-1]
        assert balance == (k != 1)
        assert logits.shape == (8,)
        assert safe.tolist() == same
        verdicts += same
    assert False in verdicts


@pytest.mark.parametrize("name", BACKBONES)
def test_own_labels_are_what_generate_gives(name):
    model = zoo.make(name)
    tensors = zoo.inputs(name, 6)
    said = reference.generate(model, tensors)[:, 1:-1]
    words = said.unique()[said.unique() > zoo.END].tolist()
    some = next(token for token in words if 0 < (said == token).any(1).sum() < len(said))
    model.generation_config.eos_token_id = ends = [some]  # so that rows end at different steps
    if reference.is_blip(model):
        model.config.text_config.sep_token_id = some
    expected = reference.generate(model, tensors)[:, 1:].tolist()
    found = own_labels(view(model), {**tensors, "labels": None}).tolist()
    lengths = set()
    for row, want in zip(found, expected, strict=True):
        length = next((t + 1 for t, token in enumerate(want) if token in ends), len(want))
        assert row[:length] == want[:length]
        assert set(row[length:]) <= {-100}
        lengths.add(length)
    assert len(lengths) > 1


@pytest.mark.parametrize("name", BACKBONES)
def test_on_its_own_path_a_gate_is_told_what_the_last_layer_generates(name, monkeypatch):
    model = agreeable(zoo.make(name)).train()
    dropout(model, 0.3)
    tensors, labels = batch_of(name)
    seen = watch_gate_loss(monkeypatch)
    run(model, tensors, labels, Step(own_path=True), Supervision(gate_balance=False))
    assert model.training
    model.eval()
    ids = reference.generate(model, tensors)
    states, logits = reference.decoder_states(model, tensors, ids[:, :-1])
    chosen = ids[:, 1:]
    assert torch.equal(logits.argmax(-1)[:, 0], chosen[:, 0])
    counts = (chosen == zoo.END).cumsum(1) - (chosen == zoo.END).long() == 0
    exits = attached(model)
    for (logits, same, _), k in zip(seen, zoo.exit_layers(name)["decoder"], strict=True):
        h = states[k][counts]
        token = reference.exit_logits(model, k, h).argmax(-1)
        assert torch.equal(same, token == chosen[counts])
        torch.testing.assert_close(logits, exits.gates[f"decoder_{k}"](h), rtol=1e-4, atol=1e-4)
    assert {False, True} <= {x for _, same, _ in seen for x in same.tolist()}


OTHERS = ("coca", "vit_gpt2", "blip", "blip_vqa", "t5", "udop", "blip2", "t5gemma2")
OF_BART = [name for name in BACKBONES if name not in OTHERS]


@pytest.mark.parametrize("name", OF_BART)
@pytest.mark.parametrize("weighting", ["avg+last", "sum", "linear"])
def test_propagated_states_are_those_of_decoding_token_by_token(name, weighting):
    model = zoo.make(name)
    tensors, labels = batch_of(name)
    backbone, exits = view(model), attached(model)
    losses = run(model, tensors, labels, Step(token_seed=9), Supervision(weighting, gate_weight=0.0))
    assert losses.by_exit == {}
    assert losses.distill == 0
    layers = decoder_exits(backbone, exits)
    depths = torch.tensor(layers)[torch.randint(len(layers), labels.shape, generator=torch.Generator().manual_seed(9))]
    memory, _, _ = encode(backbone, exits, tensors, {})
    weights = dict(zip(layers, exit_weights(weighting, layers), strict=True))
    expected, count = 0.0, int((labels >= 0).sum())
    for row in range(len(labels)):
        length = int((labels[row] >= 0).sum())
        valid = torch.ones(memory.shape[1]).bool()
        if zoo.reads_prompts(name):
            valid[zoo.IMAGE_TOKENS :] = tensors["attention_mask"][row, zoo.IMAGE_TOKENS :].bool()
        ids = [zoo.START, *labels[row, : length - 1].tolist()]
        states = token_by_token(model, memory[row][valid], ids, depths[row, :length].tolist())
        for h, k, label in zip(states, depths[row].tolist(), labels[row].tolist(), strict=False):
            logits = backbone.decoder.head(backbone.decoder.norm(exits.adapt("decoder", k, h)))
            expected += len(layers) * weights[k] * cross_entropy(logits, torch.tensor(label)) / count
    torch.testing.assert_close(losses.total, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", BACKBONES)
def test_propagated_states_are_those_of_the_engine(name):
    """Under K/V fill ``propagate`` and the same depths the engine leaves with the same states."""
    model = zoo.make(name)
    tensors = zoo.inputs(name, 3)
    layers = (*zoo.exit_layers(name)["decoder"], view(model).decoder.num_layers)
    depths = torch.tensor(layers)[torch.randint(len(layers), (3, 12), generator=torch.Generator().manual_seed(1))]
    rules = {"decoder": ExitRule("gate", layers[:-1], (0.5,) * len(layers[:-1]))}
    engine = ExitEngine(model, ExitPolicy(rules, kv_fill="propagate"))
    out, executor = engine.run(12, None, False, tensors, forced=depths.tolist())
    steps = out.sequences.shape[1] - 1
    states, _ = run_streams(view(model), attached(model), tensors, out.sequences[:, :-1], {}, depths[:, :steps])
    for row, step in itertools.product(range(3), range(steps)):
        k = int(out.exit_depths["decoder"][row, step])
        if k:
            torch.testing.assert_close(states[k][row, step], executor.states[k, row, step], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(states[-1][row, step], states[k][row, step])


def test_in_expectation_propagated_states_weigh_exits_as_deep_supervision_does(monkeypatch):
    """A single position has nothing to copy: the mean over its possible depths is the plain loss."""
    model = zoo.make("florence2")
    tensors, labels = zoo.inputs("florence2", 1), torch.tensor([[17]])
    for weighting in ("avg+last", "sum", "linear"):
        how = Supervision(weighting, gate_weight=0.0)
        totals = []
        for k in range(1, 6):
            monkeypatch.setattr(
                "lightning_mue.training.objective.sample_token_depths", lambda *_, k=k: torch.tensor([[k]])
            )
            totals.append(run(model, tensors, labels, Step(token_seed=0), how).total.item())
        assert sum(totals) / 5 == pytest.approx(run(model, tensors, labels, None, how).total.item(), rel=1e-5)


def dropout(model, p):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = p
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = p


def watch_gate_loss(monkeypatch):
    """Collect what gates are asked and told."""
    seen = []

    def loss(logits, safe, balance):
        seen.append((logits, safe, balance))
        return binary_cross_entropy_with_logits(logits, safe.float())

    monkeypatch.setattr("lightning_mue.training.gates.gate_loss", loss)
    return seen


def test_gate_balance_reaches_the_gates():
    model = agreeable(zoo.make("florence2"))
    tensors, labels = batch_of("florence2")
    balanced, plain = (run(model, tensors, labels, None, Supervision(gate_balance=b)).gates for b in (True, False))
    found = supervise(view(model), attached(model), tensors, labels, {})
    losses = []
    for k in zoo.exit_layers("florence2")["decoder"]:
        logits = attached(model).gates[f"decoder_{k}"](found.states[k][labels >= 0])
        losses.append(binary_cross_entropy_with_logits(logits, found.agrees(k).float()))
    torch.testing.assert_close(plain, torch.stack(losses).mean())
    assert not math.isclose(balanced, plain, rel_tol=1e-3)
