"""The methods compared: what the papers and their code say of each, and the one rule that tunes them all."""

import itertools
import math

import pytest
import torch

from lightning_mue.backbones import num_layers, view
from lightning_mue.inference import ExitEngine
from lightning_mue.methods import STATIC, Family, boldest, families, in_words, kv_modes, last_good
from lightning_mue.policy import ExitPolicy, ExitRule
from tests.zoo import exit_layers, inputs, shared

LAYERS = {"vision": (1, 2), "encoder": (2, 4), "decoder": (1, 2, 4, 5)}
DEPTHS = {"vision": 3, "encoder": 6, "decoder": 6}
FAMILIES = families(LAYERS, DEPTHS, steps=16)
SIGNALS = {
    "MuE": {"encoder": "similarity", "decoder": "similarity"},
    "mue-as-published": {"encoder": "flat_similarity", "decoder": "flat_similarity"},
    "DEED": {"decoder": "confidence"},
    "MuE encoder + DEED decoder": {"encoder": "similarity", "decoder": "confidence"},
    "CALM": {"decoder": "margin"},
    "FREE": {"decoder": "confidence"},
    "patience": {"decoder": "patience"},
    "entropy": {"decoder": "entropy"},
    "gate (ours)": {"decoder": "gate"},
}
"""What decides where: MuE and DEED, section 3 of each; CALM, section 3.5; PABEE; DeeBERT."""


def settings(family):
    """A method's policies from safe to bold, all dials together."""
    return [family.policy(k) for k in range(1, family.size + 1)]


def test_each_method_asks_its_own_signal_at_every_exit():
    assert set(FAMILIES) == {STATIC, *SIGNALS}
    for method, signals in SIGNALS.items():
        for policy in settings(FAMILIES[method]):
            assert {stream: rule.signal for stream, rule in policy.rules.items()} == signals
            for stream, rule in policy.rules.items():
                assert method == "FREE" or rule.layers == LAYERS[stream]
    assert [p.rules["decoder"].layers for p in settings(FAMILIES[STATIC])] == [(5,), (4,), (2,), (1,)]


def test_free_has_one_shallow_exit_after_layer_6_of_24_as_in_its_scripts():
    for layers, last, shallow in ((range(1, 24), 24, 6), ((2, 4, 8), 12, 2)):
        found = families({"decoder": layers}, {"decoder": last}, 16)["FREE"]
        assert {rule.layers for rule in found.rules["decoder"]} == {(shallow,)}


@pytest.mark.parametrize("method", SIGNALS)
def test_families_go_from_safe_to_bold(method):
    dials = [
        tuple(t for rule in policy.rules.values() for t in rule.thresholds) for policy in settings(FAMILIES[method])
    ]
    for safe, bold in itertools.pairwise(dials):
        assert all(s > b for s, b in zip(safe, bold, strict=True))
    if method == "patience":
        assert [set(dial) for dial in dials] == [{4.0}, {3.0}, {2.0}]  # one exit alone agrees with itself
    else:
        lowest = -1.0 if "similarity" in SIGNALS[method]["decoder"] else 0.0
        assert dials[-1][0] == lowest  # so low that the first exit is always taken


def test_only_mues_code_and_calm_make_up_keys_and_values():
    fills = {method: {policy.kv_fill for policy in settings(family)} for method, family in FAMILIES.items()}
    assert fills.pop("CALM") == {"propagate"}
    assert fills.pop("mue-as-published") == {"copy"}
    assert set.union(*fills.values()) == {"just-in-time"}


def thresholds(method, dial, steps=16):
    policy = next(p for p in settings(FAMILIES[method]) if p.rules["decoder"].thresholds[0] == dial)
    return [policy.rules["decoder"].thresholds_at(step, steps).get(1) for step in range(steps)]


def test_mue_decays_as_in_its_paper():
    """Theta 0.99, beta 0.95, tau 1: from 0.9905 down to 0.959 at the end."""
    found = thresholds("MuE", 0.99)
    assert found[0] == pytest.approx(0.9905)
    assert found[-1] == pytest.approx(0.95 * 0.99 + 0.05 * math.exp(-15 / 16))
    assert found[-1] == pytest.approx(0.959, abs=0.002)


def test_mues_code_protects_the_first_third_and_decays_from_there():
    """With at most 16 tokens: steps 0 to 5 at full depth, then for 0.9 about 0.876 falling to 0.847."""
    found = thresholds("mue-as-published", 0.9)
    assert found[:6] == [None] * 6
    assert found[6] == pytest.approx(0.876, abs=0.004)
    assert found[-1] == pytest.approx(0.847, abs=0.004)


def test_calm_decays_as_in_equation_5():
    assert thresholds("CALM", 0.8) == pytest.approx([0.9 * 0.8 + 0.1 * math.exp(-4 * t / 16) for t in range(16)])


def test_what_a_model_lacks_is_left_out():
    assert "gate (ours)" not in families(LAYERS, DEPTHS, 16, gates=False)
    alone = families({"decoder": (1,)}, {"decoder": 2}, 16)
    assert "patience" not in alone  # needs two exits
    assert "MuE encoder + DEED decoder" not in alone
    assert set(alone["MuE"].rules) == {"decoder"}
    with pytest.raises(ValueError, match=r"exits in \['encoder', 'vision'\] only"):
        families({"vision": (1,), "encoder": (2,)}, DEPTHS, 16)


def test_kv_modes_differ_in_nothing_else():
    modes = kv_modes((1, 2), "margin")
    assert {(p.kv_fill, p.backlog) for family in modes.values() for p in settings(family)} == {
        ("just-in-time", 0),
        ("propagate", 0),
        ("propagate", 2),
        ("propagate", 6),
        ("copy", 0),
    }
    rules = [[p.rules for p in settings(family)] for family in modes.values()]
    assert all(of_mode == rules[0] for of_mode in rules)


@pytest.mark.parametrize("name", ["florence2", "florence2_decomposed"])
def test_the_engine_obeys_all_and_the_boldest_leave_at_the_first_exit(name):
    model, layers = shared(name), exit_layers(name)
    batch, found = inputs(name, 2), families(exit_layers(name), num_layers(view(model)), steps=12)
    static = ExitPolicy({"decoder": ExitRule.static(layers["decoder"][0])})
    expected = ExitEngine(model, static).generate(**batch).sequences
    for method, family in found.items():
        for policy in (family.policy(1), family.policy(family.size)):
            depth_BT = ExitEngine(model, policy).generate(**batch).exit_depths["decoder"]
            assert depth_BT[:, :1].min() >= layers["decoder"][0]
            if method == "mue-as-published":
                assert set(depth_BT[:, :4].flatten().tolist()) <= {0, 5}  # a third of 12 tokens
    for method in ("DEED", "entropy", "gate (ours)"):
        assert torch.equal(ExitEngine(model, settings(found[method])[-1]).generate(**batch).sequences, expected)


@pytest.mark.parametrize("size", range(1, 16))
def test_the_boldest_that_keeps_enough_in_few_decodings(size):
    family = Family({"decoder": [ExitRule("confidence", (1,), (1 - k / 20,)) for k in range(size)]})
    policies = [ExitPolicy.full_depth(), *settings(family)]
    for last in range(size + 1):
        asked = []

        def quality(policy, last=last, asked=asked):
            asked.append(policy)
            return 0.9 if policies.index(policy) <= last else 0.8

        assert boldest(family, quality, 0.9) == policies[last]
        assert len(asked) <= math.ceil(math.log2(size + 1))


def test_where_quality_is_not_monotone_what_is_found_keeps_and_the_next_does_not():
    for bits in itertools.product((False, True), repeat=10):
        found = last_good(10, lambda k, good=bits: good[k - 1])
        assert found == 0 or bits[found - 1]
        assert found == 10 or not bits[found]


def test_streams_of_a_family_need_as_many_rules_each():
    rule = ExitRule.static(1)
    with pytest.raises(ValueError, match=r"as many rules each, got \{'decoder': 2, 'encoder': 1\}"):
        Family({"decoder": [rule, rule], "encoder": [rule]})


@pytest.mark.parametrize("method", ["MuE", "mue-as-published", "MuE encoder + DEED decoder"])
def test_every_stream_has_a_dial_of_its_own(method):
    """Against every pair of dials, one decoding each: nothing bolder in one stream alone keeps enough."""
    family = FAMILIES[method]
    dials = list(itertools.product(range(family.size + 1), repeat=2))
    policies = {pair: family.policy(dict(zip(("decoder", "encoder"), pair, strict=True))) for pair in dials}
    for decoder_costs, encoder_costs in ((1, 1), (1, 3), (5, 1), (0, 1), (100, 1), (1, 100)):
        loss = {pair: decoder_costs * pair[0] + encoder_costs * pair[1] for pair in dials}

        def quality(policy, loss=loss):
            return -min(of_pair for pair, of_pair in loss.items() if policies[pair] == policy)

        found = boldest(family, quality, -40)
        pair = next(pair for pair in dials if policies[pair] == found)
        assert loss[pair] <= 40
        for more in ((1, 0), (0, 1)):
            further = (pair[0] + more[0], pair[1] + more[1])
            assert further not in loss or loss[further] > 40
    assert boldest(family, lambda policy: float(not policy.rules), 1.0) == ExitPolicy.full_depth()


def test_in_words():
    assert in_words(FAMILIES["DEED"].policy(5)) == "decoder: confidence >= 0.95 at 1, 2, 4, 5"
    assert in_words(FAMILIES["mue-as-published"].policy(8)) == (
        "decoder: flat_similarity >= 0.9 at 1, 2, 4, 5 with decay 0.9 1 from token 7; "
        "encoder: flat_similarity >= 0.9 at 2, 4; K/V: copy"
    )
    uneven = ExitPolicy({"decoder": ExitRule("gate", (1, 2, 3), (0.9, math.inf, 0.8)), "vision": ExitRule.static(2)})
    assert in_words(uneven) == "decoder: gate >= 0.9 / 0.8 at 1, 3; vision: static 2"
    assert in_words(kv_modes((1,), "margin")["propagate beyond 2"].policy(1)).endswith("K/V: propagate beyond 2")
    assert in_words(ExitPolicy.full_depth()) == "full depth"
