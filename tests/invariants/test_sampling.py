"""Invariants 2, 3, 5 and 6 of sampling: what is drawn is what a loop over the backbone's own forward draws.

The noise is made here as ``Sampling.noise`` says, by numpy's Philox, and never by our own code.
"""

import itertools

import numpy as np
import pytest
import torch

from lightning_mue.inference.drafting import DraftLength
from lightning_mue.policy import ExitPolicy, ExitRule
from tests import reference, zoo
from tests.invariants.policies import STEPS, assert_same_row, decoder_rule, engine_of, mixed
from tests.invariants.test_decoder_prompt import ROWS, alone, prompted

BACKBONES = list(zoo.BACKBONES)
SEED = 7


def gumbel(seed, row, position, size=zoo.VOCABULARY):
    words = np.random.Philox(key=seed, counter=[0, position, row, 0]).random_raw(size)
    return torch.from_numpy(-np.log(-np.log(((words >> np.uint64(12)) + 0.5) / 2**52)))


def loop(model, tensors, given, row, temperature=1.0, seed=SEED):
    """Draw the answer of one row without a cache; ``given [1, P]`` is what stands before it."""
    ids, before = given, given.shape[1]
    while ids.shape[1] < before + STEPS and (ids.shape[1] == before or ids[0, -1] != zoo.END):
        logits = reference.decoder_states(model, tensors, ids)[1][0, -1].double()
        noise = gumbel(seed, row, ids.shape[1] - 1)
        token = (reference.suppressed(model, logits) / temperature + noise).argmax()
        ids = torch.cat([ids, token.view(1, 1)], 1)
    return ids[0, before:].tolist()


def tokens_of(sequences):
    return [row[: row.index(zoo.END) + 1] if zoo.END in row else row for row in sequences[:, 1:].tolist()]


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_full_depth_is_a_loop_over_the_backbones_own_forward(name, temperature):
    model, tensors = zoo.shared(name), prompted(name)
    how = {"do_sample": True, "temperature": temperature, "seed": SEED}
    out = engine_of(model, ExitPolicy.full_depth()).generate(STEPS, **how, **tensors)
    expected = []
    for row in range(ROWS):
        one, given = alone(tensors, row)
        del one["decoder_prompt"]
        expected.append(loop(model, one, given, row, temperature))
    assert tokens_of(out.sequences) == expected
    greedy = engine_of(model, ExitPolicy.full_depth()).generate(STEPS, **tensors)
    assert tokens_of(greedy.sequences) != expected


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("filtered", [{}, {"top_k": 9, "top_p": 0.8}])
def test_rows_with_seeds_of_their_own_are_drawn_as_alone(name, filtered):
    model, tensors, seeds = zoo.shared(name), zoo.inputs(name, 3), np.array([5, SEED, 5])
    engine = engine_of(model, mixed(model, name, tensors, "confidence"))
    how = {"do_sample": True, "temperature": 0.9, **filtered}
    out = engine.generate(STEPS, seed=seeds, **how, **tensors)
    for row, seed in enumerate(seeds):
        assert_same_row(out, row, engine.generate(STEPS, seed=seed, **how, **zoo.alone(tensors, row)))


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("signal", ["static", "confidence"])
def test_a_forced_exit_draws_as_a_shorter_decoder_does(name, signal):
    """Also where a signal has asked for the logits already."""
    model, tensors = zoo.shared(name), zoo.inputs(name, 1)
    depth = zoo.exit_layers(name)["decoder"][1]
    policy = ExitPolicy({"decoder": ExitRule(signal, (depth,), (0.0,))})
    out = engine_of(model, policy).generate(STEPS, do_sample=True, seed=SEED, **tensors)
    with reference.left_after(model, "decoder", depth):
        expected = loop(model, tensors, torch.full((1, 1), zoo.START), 0)
    assert tokens_of(out.sequences) == [expected]


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("signal", ["gate", "confidence", "patience"])
@pytest.mark.parametrize("filtered", [{}, {"top_k": 5}])
def test_drafts_change_no_sample(name, signal, filtered, monkeypatch):
    """The noise of a position is the same for a draft and for its check; of few tokens drafts are often right."""
    turns = itertools.cycle([3, 8, 1, 4, 2, 5])
    monkeypatch.setattr(DraftLength, "length", lambda self: next(turns))
    model, tensors = zoo.shared(name), zoo.inputs(name, 4)
    policy = ExitPolicy({"decoder": decoder_rule(model, name, tensors, signal, share=0.5)}, verified=True)
    how = {"do_sample": True, "seed": SEED, "prefix_allowed_tokens_fn": lambda _row, _ids: [11, 12], **filtered}
    out = engine_of(model, policy).generate(STEPS, **how, **tensors)
    full = engine_of(model, ExitPolicy.full_depth()).generate(STEPS, **how, **tensors)
    assert out.sequences.tolist() == full.sequences.tolist()
    assert 0 < out.agreed < out.drafted


def test_groups_are_drawn_as_rows_of_the_whole_batch():
    model, tensors, how = zoo.shared("florence2"), zoo.inputs("florence2", 4), {"do_sample": True, "seed": SEED}
    rules = {"decoder": ExitRule.static(2)}
    early, full = (
        tokens_of(engine_of(model, policy).generate(STEPS, **how, **tensors).sequences)
        for policy in (ExitPolicy(rules), ExitPolicy.full_depth())
    )
    engine = engine_of(model, ExitPolicy(rules, groups=("a",)))
    apart = tokens_of(engine.generate(STEPS, groups=["b", "a", "b", "a"], **how, **tensors).sequences)
    assert apart == [full[0], early[1], full[2], early[3]]
    assert early != full


def test_what_sampling_cannot_do_is_refused():
    engine, tensors = engine_of(zoo.shared("florence2"), ExitPolicy.full_depth()), zoo.inputs("florence2", 2)
    for wrong, message in (
        ({"num_beams": 2}, "needs num_beams=1, got 2"),
        ({"temperature": 0.0}, "towards 0 it is greedy"),
        ({"top_p": 0.0}, "`top_p` in"),
        ({"top_k": -1}, "`top_k` must"),
        ({"seed": -1}, "`seed` must be in"),
        ({"seed": [1, 2, 3]}, "one for each of 2 rows, got 3"),
        ({"min_p": 0.1}, "does not do"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.generate(STEPS, do_sample=True, **wrong, **tensors)
    with pytest.raises(ValueError, match="ask for `do_sample=True`"):
        engine.generate(STEPS, temperature=0.7, **tensors)
