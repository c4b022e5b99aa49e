"""Invariant 2 with beams: at full depth the best hypothesis is that of transformers' ``generate``."""

import itertools

import numpy as np
import pytest
import torch

from lightning_mue.backbones import view
from lightning_mue.inference.beams import BeamSearch, BeamSettings
from lightning_mue.policy import ExitPolicy, ExitRule
from tests import reference, zoo
from tests.invariants.policies import STEPS, decoder_rule, encoder_rules, engine_of, executor_class
from tests.invariants.test_decoder_prompt import ROWS, alone, prompted

BACKBONES = list(zoo.BACKBONES)
SETTINGS = [
    {"num_beams": 2},
    {"num_beams": 4, "early_stopping": True},
    {"num_beams": 3, "early_stopping": "never", "length_penalty": 2.0},
    {"num_beams": 5, "length_penalty": -1.0},
    {"num_beams": 3, "early_stopping": "never", "length_penalty": -0.5},
]


def often_ending(row, ids):
    """Few tokens, and from a step of each row's own one that ends: hypotheses of many lengths compete."""
    return [11 + row, 20, 21 if len(ids) < 3 + row else zoo.END]


def answers(ids):
    """Return each row's tokens; transformers fills up beams with the end token where the padding's id is 0."""
    return [row[: row.index(zoo.END) + 1] if zoo.END in row else row for row in ids.tolist()]


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("constraint", [None, often_ending])
def test_full_depth_equals_generate(name, settings, constraint):
    model, tensors = zoo.shared(name), zoo.inputs(name, 6)
    how = settings | {"max_new_tokens": STEPS, "prefix_allowed_tokens_fn": constraint}
    expected = reference.generate(model, tensors, **how)
    found = engine_of(model, ExitPolicy.full_depth()).generate(**tensors, **how).sequences
    assert answers(found) == answers(expected)
    assert constraint is None or settings.get("length_penalty", 1.0) > 0 or len({*map(len, answers(found))}) > 1


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("settings", [{"no_repeat_ngram_size": 2}, {"forced_bos_token_id": 9}])
def test_processors_see_the_tokens_of_each_beam(name, settings):
    model, tensors = zoo.make(name), zoo.inputs(name, 3)
    for key, value in settings.items():
        setattr(model.generation_config, key, value)
    expected = reference.generate(model, tensors, max_new_tokens=9, num_beams=3)
    found = engine_of(model, ExitPolicy.full_depth()).generate(9, num_beams=3, **tensors).sequences
    assert answers(found) == answers(expected)


@pytest.mark.parametrize("name", BACKBONES)
def test_prompts_of_several_lengths(name):
    model, tensors = zoo.shared(name), prompted(name)
    found = engine_of(model, ExitPolicy.full_depth()).generate(STEPS, num_beams=3, **tensors).sequences
    for row in range(ROWS):
        one, given = alone(tensors, row)
        del one["decoder_prompt"]
        how = {"num_beams": 3, "early_stopping": False, "max_new_tokens": STEPS}
        ids = reference.generate(model, one, decoder_input_ids=given, **how)[0, given.shape[1] :]
        assert found[row, 1 : 1 + len(ids)].tolist() == ids.tolist()


@pytest.mark.parametrize("name", BACKBONES)
def test_exits_at_one_depth_are_the_beams_of_a_shorter_decoder(name):
    model, tensors = zoo.shared(name), zoo.inputs(name, 3)
    depth = zoo.exit_layers(name)["decoder"][1]
    expected = reference.truncated_generate(model, tensors, "decoder", depth, num_beams=3, max_new_tokens=STEPS)
    found = engine_of(model, ExitPolicy({"decoder": ExitRule.static(depth)})).generate(STEPS, num_beams=3, **tensors)
    assert answers(found.sequences) == answers(expected)
    assert {*found.exit_depths["decoder"].flatten().tolist()} <= {0, depth}


@pytest.mark.parametrize("name", BACKBONES)
def test_beams_that_leave_at_many_layers_have_the_states_of_a_full_pass(name, monkeypatch):
    """Each (position, layer) is computed once for all beams that share it, and before any of them reads it."""
    model, tensors = zoo.shared(name), zoo.inputs(name, 3)
    policy = ExitPolicy(encoder_rules(model, name, tensors) | {"decoder": decoder_rule(model, name, tensors, "gate")})
    seen, run_layer = set(), executor_class().run_layer

    def counting(self, layer, pending):
        for first, last, rows in pending:
            for row, position in itertools.product(rows, range(first, last)):
                place = layer, int(self._owner_RT[row, position]), position
                assert place not in seen, "a (position, layer) was computed twice"
                seen.add(place)
        run_layer(self, layer, pending)

    monkeypatch.setattr(executor_class(), "run_layer", counting)
    out = engine_of(model, policy).generate(STEPS, num_beams=4, **tensors)
    assert out.pairs == len(seen)
    last = view(model).decoder.num_layers
    assert len({*out.exit_depths["decoder"].flatten().tolist()} - {0, last}) > 1
    for row in range(3):
        single = engine_of(model, policy)
        seen.clear()
        found = single.generate(STEPS, num_beams=4, **{key: value[row : row + 1] for key, value in tensors.items()})
        length = found.sequences.shape[1]
        assert out.sequences[row, :length].tolist() == found.sequences[0].tolist()
        assert out.exit_depths["decoder"][row, : length - 1].tolist() == found.exit_depths["decoder"][0].tolist()


@pytest.mark.parametrize("name", BACKBONES)
def test_log_probabilities_of_shared_positions_are_those_of_forward(name):
    """What the last step of full depth sees, for every beam that is left, whatever beams it came from."""
    model, tensors = zoo.shared(name), zoo.inputs(name, 2)
    seen, log_probs = [], executor_class().log_probs

    def noting(self, exits):
        found_RV = log_probs(self, exits)
        ((places),) = exits.values()
        for (row, position), of_row in zip(places, found_RV, strict=True):
            path = [int(self.ids[self._owner_RT[row, t], t]) for t in range(position + 1)]
            seen.append((row // 3, path, torch.as_tensor(of_row).clone()))
        return found_RV

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor_class(), "log_probs", noting)
        engine_of(model, ExitPolicy.full_depth()).generate(6, num_beams=3, **tensors)
    for sample, path, found in seen:
        one = {key: value[sample : sample + 1] for key, value in tensors.items()}
        _, logits = reference.decoder_states(model, one, torch.tensor([path]))
        expected = reference.suppressed(model, logits[0, -1].log_softmax(-1))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_what_beams_cannot_do_is_refused():
    model, tensors = zoo.shared("florence2"), zoo.inputs("florence2", 1)
    with pytest.raises(ValueError, match="at least 2"):
        engine_of(model, ExitPolicy.full_depth()).generate(num_beams=0, **tensors)
    with pytest.raises(ValueError, match="early_stopping"):
        engine_of(model, ExitPolicy.full_depth()).generate(num_beams=2, early_stopping="soon", **tensors)
    for policy in (
        ExitPolicy({"decoder": ExitRule.static(1)}, kv_fill="copy"),
        ExitPolicy({"decoder": ExitRule.static(1)}, verified=True),
    ):
        with pytest.raises(ValueError, match="num_beams=1"):
            engine_of(model, policy).generate(num_beams=2, **tensors)


def test_what_allows_nothing_in_the_end_still_answers():
    search = BeamSearch(BeamSettings(2), [3], steps=2)
    first = np.log(np.full((2, 5), 0.2, np.float32))
    assert len(search.advance(first, [1, 1])) == 2
    begun = [list(beam.tokens) for beam in search.running]
    search.advance(np.full((2, 5), -np.inf, np.float32), [1, 1])
    assert search.done
    assert search.finished[0].tokens in begun


def test_a_vocabulary_of_its_end_alone():
    search = BeamSearch(BeamSettings(2), [0], steps=4)
    search.advance(np.zeros((2, 1), np.float32), [2, 2])
    assert (search.done, search.finished[0].tokens, search.finished[0].depths) == (True, [0], [2])
