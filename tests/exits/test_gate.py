"""Gates, and the shortlist over which they see how sure an exit is."""

import math

import pytest
import torch
from torch import nn

from lightning_mue.backbones import fingerprint, view
from lightning_mue.backbones.bart import BartDecoderStream
from lightning_mue.exits import ExitConfig, attach_exits, attached, load_exits, save_exits
from lightning_mue.exits.gate import ExitGate, top_two
from lightning_mue.export import freeze, load
from lightning_mue.inference import ExitEngine
from lightning_mue.policy import ExitPolicy, ExitRule
from lightning_mue.training.gates import decoder_gate_logits
from lightning_mue.training.supervised import supervise
from tests import zoo
from tests.training.test_supervised import BACKBONES, batch_of, reference_logits

SOME = torch.tensor([3, 7, 8, 20, 55, 56, 90, 96])


def with_shortlist(name, size, ids=None):
    model = zoo.make(name, exits=False)
    config = ExitConfig(**zoo.BACKBONES[name][2], adapter_width=8, gate_width=8, shortlist=size)
    exits = attach_exits(model, config)
    with torch.no_grad():
        for parameter in exits.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    if ids is not None:
        exits.set_shortlist(torch.bincount(ids, minlength=zoo.VOCABULARY))
    return model.eval()


def log_odds(p):
    """What a gate sees of probabilities, by definition; the random models here are never surer than its ends."""
    assert 1e-6 < p.min() < p.max() < 1 - 1e-6
    return (p / (1 - p)).log()


def test_a_gate_sees_how_nearly_sure_an_exit_is_and_no_infinity():
    nearly, surely = top_two(torch.tensor([[9.0, 0.0, 0.0], [500.0, 0.0, 0.0]]))
    assert nearly.tolist() == pytest.approx([9 - math.log(2), -math.log(math.exp(9) + 1)], rel=1e-4)
    assert surely.tolist() == pytest.approx([math.log(1e6), -math.log(1e6)], rel=1e-2)


def watch_gates(monkeypatch):
    """Collect what gates are shown beside the state."""
    shown, forward = [], ExitGate.forward
    monkeypatch.setattr(
        ExitGate, "forward", lambda self, h, beside=None: shown.append(beside) or forward(self, h, beside)
    )
    return shown


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("size", [zoo.VOCABULARY, 1000])
def test_a_shortlist_of_the_whole_vocabulary_gives_how_sure_the_exit_is(name, size, monkeypatch):
    model = with_shortlist(name, size)
    tensors, labels = batch_of(name)
    shown = watch_gates(monkeypatch)
    found = supervise(view(model), attached(model), tensors, labels, {})
    decoder_gate_logits(view(model), attached(model), found)
    for beside, k in zip(shown, zoo.exit_layers(name)["decoder"], strict=True):
        p = reference_logits(model, name, tensors, labels)[k][labels >= 0].softmax(-1).sort(-1, descending=True).values
        torch.testing.assert_close(beside, log_odds(p[:, :2]))


@pytest.mark.parametrize("name", BACKBONES)
def test_a_shortlist_leaves_the_other_tokens_out(name, monkeypatch):
    model = with_shortlist(name, len(SOME), SOME)
    tensors, labels = batch_of(name)
    shown = watch_gates(monkeypatch)
    found = supervise(view(model), attached(model), tensors, labels, {})
    decoder_gate_logits(view(model), attached(model), found)
    for beside, k in zip(shown, zoo.exit_layers(name)["decoder"], strict=True):
        odds = reference_logits(model, name, tensors, labels)[k][labels >= 0][:, SOME].exp()
        p = (odds / odds.sum(-1, keepdim=True)).sort(-1, descending=True).values
        torch.testing.assert_close(beside, log_odds(p[:, :2]))
        assert not beside.requires_grad


@pytest.mark.parametrize("name", BACKBONES)
def test_at_inference_a_gate_scores_as_in_training(name):
    model = with_shortlist(name, len(SOME), SOME)
    tensors = zoo.inputs(name, 3)
    out, executor = ExitEngine(model, ExitPolicy.full_depth()).run(6, None, False, tensors)
    tokens = out.sequences[:, 1:].clone()
    with torch.no_grad():
        found = supervise(view(model), attached(model), tensors, tokens, {})
        logits = decoder_gate_logits(view(model), attached(model), found)
    for k, logits_N in logits.items():
        expected = logits_N.sigmoid().view(tokens.shape)
        for t in range(tokens.shape[1]):
            live = (out.exit_depths["decoder"][:, t] > 0).nonzero()[:, 0]
            scores = executor.scores("gate", k, live, t, None)
            torch.testing.assert_close(scores, expected[live, t], rtol=1e-4, atol=1e-5)


def test_rows_are_gathered_once_per_decode(monkeypatch):
    model = with_shortlist("florence2", len(SOME), SOME)
    calls, head_rows = [], BartDecoderStream.head_rows
    monkeypatch.setattr(BartDecoderStream, "head_rows", lambda self, ids: calls.append(ids) or head_rows(self, ids))
    rule = ExitRule("gate", (1, 2, 3, 4), (0.6,) * 4)
    ExitEngine(model, ExitPolicy({"decoder": rule})).generate(**zoo.inputs("florence2", 2))
    assert len(calls) == 1
    ExitEngine(model, ExitPolicy.full_depth()).generate(**zoo.inputs("florence2", 2))
    assert len(calls) == 1, "nobody asked a gate"


@pytest.mark.parametrize("bias", [True, False])
def test_head_rows_are_rows_of_the_head(bias):
    decoder = zoo.make("florence2", exits=False).model.language_model.decoder
    head, h = nn.Linear(32, zoo.VOCABULARY, bias=bias), torch.randn(2, 3, 32)
    stream = BartDecoderStream(decoder, head)
    torch.testing.assert_close(stream.head_rows(SOME)(h), head(h)[..., SOME])
    assert stream.vocab_size == zoo.VOCABULARY


def test_the_most_frequent_tokens_are_listed_and_ties_go_to_the_first():
    exits = attached(with_shortlist("florence2", 4))
    assert exits.shortlist.tolist() == [0, 1, 2, 3]
    counts = torch.zeros(zoo.VOCABULARY, dtype=torch.long)
    counts[[60, 9, 5, 30, 31]] = torch.tensor([7, 100, 2, 2, 2])
    exits.set_shortlist(counts)
    assert exits.shortlist.tolist() == [5, 9, 30, 60]


def test_a_shortlist_goes_where_the_weights_go(tmp_path):
    model = with_shortlist("florence2", len(SOME), SOME)
    before = fingerprint(model)
    save_exits(model, tmp_path / "exits.safetensors")
    other = zoo.make("florence2", exits=False)
    assert torch.equal(load_exits(other, tmp_path / "exits.safetensors").shortlist, SOME)
    rule = ExitRule("gate", (1, 2, 3, 4), (0.6,) * 4)
    folder = freeze(model, ExitPolicy({"decoder": rule}), tmp_path / "bundle")
    engine, tensors = load(folder), zoo.inputs("florence2", 3)
    assert torch.equal(attached(engine.model).shortlist, SOME)
    expected = ExitEngine(model, ExitPolicy({"decoder": rule})).generate(**tensors)
    found = engine.generate(**tensors)
    assert torch.equal(found.exit_depths["decoder"], expected.exit_depths["decoder"])
    attached(model).set_shortlist(torch.arange(zoo.VOCABULARY))
    assert fingerprint(model) != before


def test_without_a_shortlist_nothing_is_added():
    exits = attached(zoo.make("florence2"))
    assert exits.shortlist is None
    assert exits.shortlist_head(view(zoo.make("florence2")).decoder) is None
    assert not [key for key in exits.state_dict() if "shortlist" in key or "beside" in key]
    with pytest.raises(ValueError, match="attach them with `shortlist`"):
        exits.set_shortlist(torch.ones(zoo.VOCABULARY))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"decoder": [1], "shortlist": 1}, "`shortlist` must be 0 .none. or at least 2 tokens, got 1"),
        ({"decoder": [1], "shortlist": -5}, "at least 2 tokens, got -5"),
        ({"decoder": [1], "shortlist": 8, "gate": False}, "it needs `gate: true`"),
        ({"encoder": [1], "shortlist": 8}, "exits of `decoder`"),
    ],
)
def test_a_shortlist_for_nobody_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        attach_exits(zoo.make("florence2", exits=False), config)
