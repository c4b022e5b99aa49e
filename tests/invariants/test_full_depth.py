"""Invariants 1 and 2: exits change no full-depth output; the full-depth engine is the backbone's own ``generate``."""

import pytest
import torch

from lightning_mue.backbones import EXITS, view
from lightning_mue.exits import attach_exits, detach_exits
from lightning_mue.policy import ExitPolicy, ExitRule
from tests import reference, zoo
from tests.invariants.policies import engine_of
from tests.promises import certificate

BACKBONES = list(zoo.BACKBONES)


@pytest.mark.parametrize("name", BACKBONES)
def test_attaching_changes_no_output_and_no_key(name):
    model = zoo.make(name, exits=False)
    batch = zoo.inputs(name, 3)
    ids = torch.randint(5, 90, (3, 7))
    before, keys = reference.forward(model, batch, ids).logits, set(model.state_dict())
    attach_exits(model, zoo.exit_config(name))
    after = reference.forward(model, batch, ids).logits
    assert torch.equal(before, after)
    new = set(model.state_dict()) - keys
    assert new
    assert all(key.startswith(f"{EXITS}.") for key in new)
    assert keys <= set(model.state_dict())
    detach_exits(model)
    assert set(model.state_dict()) == keys


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_full_depth_equals_generate(name, batch, seed):
    model = zoo.shared(name, seed)
    tensors = zoo.inputs(name, batch, seed)
    expected = reference.generate(model, tensors, max_new_tokens=14)
    found = engine_of(model, ExitPolicy.full_depth()).generate(**tensors, max_new_tokens=14).sequences
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("name", BACKBONES)
def test_the_mask_may_be_left_out_where_nothing_is_padded(name):
    model, tensors = zoo.shared(name), zoo.inputs(name, 1)
    expected = reference.generate(model, tensors).tolist()
    tensors.pop("attention_mask", None)
    if "bbox" in tensors:  # UDOP's mask hides more than padding
        expected = reference.generate(model, tensors).tolist()
    assert engine_of(model, ExitPolicy.full_depth()).generate(**tensors).sequences.tolist() == expected
    assert view(model).generate(tensors, num_beams=1, do_sample=False).tolist() == expected


@pytest.mark.parametrize("name", BACKBONES)
def test_full_depth_logits_are_those_of_forward(name):
    model, tensors = zoo.shared(name), zoo.inputs(name, 4)
    out, executor = engine_of(model, ExitPolicy.full_depth()).run(14, None, False, tensors)
    ids = out.sequences[:, :-1]
    _, logits = reference.decoder_states(model, tensors, ids)
    for row, position in (out.exit_depths["decoder"] > 0).nonzero().tolist():
        found = torch.as_tensor(executor.exit_logits(executor.num_layers, torch.tensor([row]), position)[0])
        torch.testing.assert_close(found, reference.suppressed(model, logits[row, position]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize(
    "settings", [{"no_repeat_ngram_size": 2}, {"forced_bos_token_id": 9}, {"forced_eos_token_id": zoo.END}]
)
def test_generation_config_is_obeyed(name, settings):
    model = zoo.make(name)
    tensors = zoo.inputs(name, 3)
    for key, value in settings.items():
        setattr(model.generation_config, key, value)
    expected = reference.generate(model, tensors, max_new_tokens=9)
    found = engine_of(model, ExitPolicy.full_depth()).generate(**tensors, max_new_tokens=9).sequences
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("name", BACKBONES)
def test_constrained_answers_equal_generate(name):
    model = zoo.shared(name)
    tensors = zoo.inputs(name, 4)

    def allowed(_, ids):
        return [11, 12, 13] if len(ids) < 3 else [zoo.END]

    expected = reference.generate(model, tensors, prefix_allowed_tokens_fn=allowed)
    engine = engine_of(model, ExitPolicy.full_depth())
    assert engine.generate(**tensors, prefix_allowed_tokens_fn=allowed).sequences.tolist() == expected.tolist()


@pytest.mark.parametrize("name", BACKBONES)
def test_unsupported_generation_settings_are_refused(name):
    model = zoo.make(name)
    model.generation_config.repetition_penalty = 1.3
    with pytest.raises(ValueError, match="repetition_penalty"):
        engine_of(model, ExitPolicy.full_depth()).generate(**zoo.inputs(name, 1))


@pytest.mark.parametrize("name", BACKBONES)
def test_a_constraint_knows_its_row_when_others_have_finished(name):
    model = zoo.shared(name)
    tensors = zoo.inputs(name, 4)

    def allowed(row, ids):
        return [10 + row] if len(ids) <= 4 - row else [zoo.END]  # every row ends at another step

    expected = reference.generate(model, tensors, prefix_allowed_tokens_fn=allowed)
    layers = zoo.exit_layers(name)["decoder"]
    for policy in (
        ExitPolicy.full_depth(),
        ExitPolicy({"decoder": ExitRule("confidence", layers, [0.9] * len(layers))}),
    ):
        found = engine_of(model, policy).generate(**tensors, prefix_allowed_tokens_fn=allowed)
        assert found.sequences.tolist() == expected.tolist()


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("settings", [{"max_length": 6}, {}, {"max_new_tokens": 3}])
def test_the_length_is_that_of_generate(name, settings):
    model = zoo.make(name)
    tensors = zoo.inputs(name, 2)
    model.generation_config.max_new_tokens = None
    for key, value in settings.items():
        setattr(model.generation_config, key, value)
    expected = reference.generate(model, tensors)
    assert engine_of(model, ExitPolicy.full_depth()).generate(**tensors).sequences.tolist() == expected.tolist()


def test_what_the_engine_does_not_do_is_refused():
    engine, tensors = engine_of(zoo.make("florence2"), ExitPolicy.full_depth()), zoo.inputs("florence2", 1)
    with pytest.raises(ValueError, match=r"does not do \['num_return_sequences'\]"):
        engine.generate(**tensors, num_return_sequences=2)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        engine.generate(0, **tensors)


def test_a_certified_length_is_kept():
    model, tensors = zoo.make("florence2"), zoo.inputs("florence2", 2)
    promise = certificate(metric="exact_match", decode={"max_new_tokens": 3})
    assert engine_of(model, ExitPolicy(certificate=promise)).generate(**tensors).sequences.shape[1] == 4
