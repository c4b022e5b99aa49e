"""Invariant 6: what a verified policy answers is what transformers' ``generate`` answers, however it drafts."""

import itertools

import pytest
import torch

from lightning_mue.backbones import view
from lightning_mue.inference import drafting
from lightning_mue.inference.drafting import DraftLength
from lightning_mue.policy import ExitPolicy, ExitRule
from tests import reference, zoo
from tests.invariants.policies import CLOSED, STEPS, decoder_rule, engine_of, executor_class, random_depths
from tests.invariants.test_decoder_prompt import ROWS, prompted, reference_ids

BACKBONES = list(zoo.BACKBONES)


@pytest.fixture(autouse=True)
def lengths(monkeypatch):
    """Cycles of every length in turn, whatever steps cost here."""
    turns = itertools.cycle([3, 8, 1, 4, 2, 5])
    monkeypatch.setattr(DraftLength, "length", lambda self: next(turns))


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("signal", ["gate", "similarity", "confidence", "patience", "static"])
@pytest.mark.parametrize("closed", [False, True])
def test_the_answer_is_that_of_generate(name, signal, closed):
    """Where one token alone is allowed every draft is right, over all tokens of a random model hardly one."""
    model, tensors = zoo.shared(name), zoo.inputs(name, 4)
    layers, last = zoo.exit_layers(name)["decoder"], view(model).decoder.num_layers
    rule = ExitRule.static(layers[-1]) if signal == "static" else decoder_rule(model, name, tensors, signal, share=0.5)
    prefix_fn = (lambda _row, ids: [11] if len(ids) % 3 else [*CLOSED, zoo.END]) if closed else None
    policy = ExitPolicy({"decoder": rule}, verified=True)
    out = engine_of(model, policy).generate(STEPS, prefix_allowed_tokens_fn=prefix_fn, **tensors)
    expected = reference.generate(model, tensors, max_new_tokens=STEPS, prefix_allowed_tokens_fn=prefix_fn)
    assert out.sequences.tolist() == expected.tolist()
    depths = out.exit_depths["decoder"]
    assert {*depths.flatten().tolist()} <= {0, *layers, last}
    if closed:
        assert out.agreed == ((depths > 0) & (depths < last)).sum() > 0
    else:
        assert out.agreed < out.drafted or signal == "patience"


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize(
    "settings", [{"no_repeat_ngram_size": 2}, {"forced_bos_token_id": 9}, {"forced_eos_token_id": zoo.END}]
)
def test_processors_see_the_tokens_before_each_draft(name, settings):
    model, tensors = zoo.make(name), zoo.inputs(name, 3)
    for key, value in settings.items():
        setattr(model.generation_config, key, value)
    expected = reference.generate(model, tensors, max_new_tokens=9)
    policy = ExitPolicy({"decoder": ExitRule.static(zoo.exit_layers(name)["decoder"][-1])}, verified=True)
    assert engine_of(model, policy).generate(9, **tensors).sequences.tolist() == expected.tolist()


@pytest.mark.parametrize("name", BACKBONES)
def test_a_constraint_that_ends_answers_is_obeyed(name):
    model, tensors = zoo.shared(name), zoo.inputs(name, 4)

    def allowed(row, ids):
        return [11, 12, 13] if len(ids) <= 5 - row else [zoo.END]

    expected = reference.generate(model, tensors, prefix_allowed_tokens_fn=allowed)
    policy = ExitPolicy({"decoder": ExitRule.static(zoo.exit_layers(name)["decoder"][0])}, verified=True)
    found = engine_of(model, policy).generate(**tensors, prefix_allowed_tokens_fn=allowed)
    assert found.sequences.tolist() == expected.tolist()
    assert found.drafted > found.agreed


@pytest.mark.parametrize("name", BACKBONES)
def test_prompts_of_several_lengths(name):
    model, tensors = zoo.shared(name), prompted(name)
    policy = ExitPolicy({"decoder": ExitRule.static(zoo.exit_layers(name)["decoder"][-1])}, verified=True)
    found = engine_of(model, policy).generate(STEPS, **tensors).sequences
    for row in range(ROWS):
        expected = reference_ids(model, tensors, row)
        assert found[row, : len(expected)].tolist() == list(expected)


@pytest.mark.parametrize("name", BACKBONES)
def test_states_are_those_of_a_full_pass_also_after_drafts_that_were_wrong(name, monkeypatch):
    model, tensors = zoo.shared(name), zoo.inputs(name, 3)
    policy = ExitPolicy({"decoder": ExitRule.static(zoo.exit_layers(name)["decoder"][0])}, verified=True)
    out, executor = engine_of(model, policy).run(STEPS, None, False, tensors, forced=random_depths(name, 3))
    states, _ = reference.decoder_states(model, tensors, out.sequences[:, :-1])
    for row, position in (out.exit_depths["decoder"] > 0).nonzero().tolist():
        for layer in range(1, executor.num_layers):  # the last one's reference has passed the final norm
            found = executor.states[layer, row, position]
            torch.testing.assert_close(torch.as_tensor(found), states[layer][row, position], rtol=1e-4, atol=1e-4)
    assert isinstance(executor, executor_class())


def test_without_drafts_every_token_goes_through_all_layers_once(monkeypatch):
    model, tensors = zoo.shared("florence2"), zoo.inputs("florence2", 2)
    monkeypatch.setattr(DraftLength, "length", lambda self: 1)
    drafts = engine_of(model, ExitPolicy({"decoder": ExitRule.static(1)}, verified=True)).generate(STEPS, **tensors)
    full = engine_of(model, ExitPolicy.full_depth()).generate(STEPS, **tensors)
    assert (drafts.drafted, drafts.pairs, drafts.layer_runs["decoder"]) == (0, full.pairs, full.layer_runs["decoder"])


def test_what_steps_cost_is_measured_once_for_a_batch_size(monkeypatch):
    model, tensors = zoo.shared("florence2"), zoo.inputs("florence2", 2)
    asked = []
    measure = drafting.measure_cost
    monkeypatch.setattr(drafting, "measure_cost", lambda *given: asked.append(given[1]) or measure(*given))
    engine = engine_of(model, ExitPolicy({"decoder": ExitRule.static(1)}, verified=True))
    for _ in range(2):
        engine.generate(STEPS, **tensors)
        engine.generate(STEPS, **{name: tensor[:1] for name, tensor in tensors.items()})
    assert asked == [2, 1]
