"""A policy of lower precision runs a copy of the model."""

import copy

import pytest
import torch

from lightning_mue.inference import ExitEngine
from lightning_mue.policy import ExitPolicy, ExitRule
from tests import zoo

RULES = {"vision": ExitRule.static(2), "decoder": ExitRule("margin", (1, 2, 3), (0.2, 0.2, 0.2))}


@pytest.mark.parametrize("rules", [{}, RULES])
def test_it_is_the_model_in_that_precision(rules):
    model, tensors = zoo.make("florence2"), zoo.inputs("florence2", 3)
    before = copy.deepcopy(model.state_dict())
    engine = ExitEngine(model, ExitPolicy(rules, precision="bfloat16"))
    found = engine.generate(8, **tensors)
    lower = copy.deepcopy(model).to(torch.bfloat16)
    given = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in tensors.items()}
    expected = ExitEngine(lower, ExitPolicy(rules)).generate(8, **given)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.exit_depths["decoder"], expected.exit_depths["decoder"])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert next(engine.model.parameters()).dtype == torch.bfloat16
    assert ExitEngine(lower, ExitPolicy(rules, precision="bfloat16")).model is lower  # nothing to copy


def test_words_bytes_and_what_is_refused():
    policy = ExitPolicy(precision="bfloat16")
    assert not policy.is_full_depth
    assert policy.depths_in_words() == "full depth; in bfloat16"
    assert ExitPolicy.from_json(policy.to_json()) == policy
    with pytest.raises(ValueError, match=r"`precision` must be one of .*, got 'int4'"):
        ExitPolicy(precision="int4")
