"""How far to draft: against brute force, and against what drafting really settles."""

import json

import numpy as np
import pytest

from lightning_mue.inference.drafting import LONGEST, DraftLength, StepCost, measure_cost
from lightning_mue.policy import ExitPolicy, ExitRule
from tests.promises import certificate

COST = StepCost(layer=(3.0, 0.1), head=(3.5, 0.3))


def simulated_ms_per_token(k, acceptance, depth, layers, cost, cycles=20_000):
    """Play cycles: each position through the exit's layers, then all of them through the others."""
    rng = np.random.default_rng(0)
    ms = tokens = 0.0
    for _ in range(cycles):
        settled = 1
        while settled < k and rng.random() < acceptance:
            settled += 1
        ms += k * depth * cost.layer[0] + (k - 1) * cost.head[0]
        ms += (layers - depth) * (cost.layer[0] + (k - 1) * cost.layer[1]) + cost.head[0] + (k - 1) * cost.head[1]
        tokens += settled
    return ms / tokens


@pytest.mark.parametrize(("right", "depth"), [(0.95, 1), (0.8, 2), (0.5, 1), (0.2, 3)])
def test_the_length_is_the_one_that_costs_least(right, depth):
    drafts = DraftLength(6, depth, COST)
    rng = np.random.default_rng(1)
    for _ in range(3_000):
        agreed = 0
        while agreed < 4 and rng.random() < right:
            agreed += 1
        drafts.saw([depth] * 4, agreed)
    assert drafts.acceptance == pytest.approx(right, abs=0.08)
    brute = {k: simulated_ms_per_token(k, drafts.acceptance, depth, 6, COST) for k in range(1, LONGEST + 1)}
    assert brute[drafts.length()] <= 1.01 * min(brute.values())


def test_drafts_that_are_never_right_are_given_up_and_tried_again():
    drafts = DraftLength(6, 2, COST)
    assert drafts.length() > 1
    tried = 0
    while drafts.length() > 1:
        drafts.saw([2] * (drafts.length() - 1), 0)
        tried += 1
    assert tried < 10
    waited = 0
    while drafts.length() == 1:
        drafts.saw([], 0)
        waited += 1
    assert tried < waited < 500


def test_where_the_layers_above_cost_as_much_together_as_alone_nothing_is_drafted():
    assert DraftLength(6, 2, StepCost(layer=(3.0, 3.0), head=(1.0, 1.0))).length() == 1


def test_cost_is_a_line_through_what_was_measured():
    class Counting:
        num_layers = 2

        def embed(self, rows, first, tokens):
            assert [len(row) for row in tokens] == [LONGEST] * len(rows)

        def run_layer(self, layer, pending):
            assert pending in ([(0, 1, [0, 1, 2])], [(0, LONGEST, [0, 1, 2])])

        def choose(self, exits):
            assert len(exits[2]) in (3, 3 * LONGEST)

    cost = measure_cost(Counting(), 3)
    assert min(*cost.layer, *cost.head) >= 0


@pytest.mark.parametrize(
    ("rules", "more"),
    [
        ({}, {}),
        ({"decoder": ExitRule.static(1), "encoder": ExitRule.static(1)}, {}),
        ({"decoder": ExitRule.static(1)}, {"kv_fill": "copy"}),
    ],
)
def test_what_cannot_be_verified_is_refused(rules, more):
    with pytest.raises(ValueError, match="needs a rule for 'decoder', no others"):
        ExitPolicy(rules, verified=True, **more)


def test_a_policy_as_drafts_keeps_the_decoder_rule_alone():
    policy = ExitPolicy({"decoder": ExitRule.static(1), "encoder": ExitRule.static(2)}, precision="int8")
    drafts = policy.as_drafts()
    assert drafts == ExitPolicy({"decoder": ExitRule.static(1)}, verified=True)
    assert ExitPolicy.from_json(drafts.to_json()) == drafts
    assert drafts.depths_in_words() == "decoder: static 1; drafts, settled by the last layer"


def test_drafts_decode_as_was_certified():
    settings = {"max_new_tokens": 4, "answers": ["yes", "no"], "runtime": "onnxruntime"}
    policy = ExitPolicy({"decoder": ExitRule.static(1)}, precision="int8", certificate=certificate(decode=settings))
    drafts = policy.as_drafts()
    assert drafts.certificate.decode == settings
    assert drafts.runtime == "onnxruntime"
    assert drafts.certificate.in_words().startswith("Verified: what leaves the decoder early is a draft")
    assert "p = " not in drafts.certificate.explained()
    with pytest.raises(ValueError, match=r"need a rule for the decoder, this policy has \['vision'\]"):
        ExitPolicy({"vision": ExitRule.static(1)}).as_drafts()


def test_versions_that_know_no_drafts_refuse_them():
    assert json.loads(ExitPolicy({"decoder": ExitRule.static(1)}).as_drafts().to_json())["schema"] == 3
    assert json.loads(ExitPolicy({"decoder": ExitRule.static(1)}).to_json())["schema"] == 2


def test_a_short_decoder_is_measured_with_the_positions_it_has():
    class Short:
        num_layers = 1

        def embed(self, rows, first, tokens):
            assert [len(row) for row in tokens] == [1]

        def run_layer(self, layer, pending):
            assert pending == [(0, 1, [0])]

        def choose(self, exits):
            assert exits == {1: [(0, 0)]}

    assert measure_cost(Short(), 1, 1).layer[1] == 0
