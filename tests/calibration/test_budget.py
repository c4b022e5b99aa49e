"""So many milliseconds, and the most quality that can be shown for them."""

import numpy as np
import pytest

from lightning_mue.calibration import Decoded, Provenance, p_value, propose, rehearse, simulate
from lightning_mue.calibration.budget import KEEPS, best_within, certify_budget, kept_bound, within_budget
from lightning_mue.policy import ExitPolicy
from lightning_mue.promise import Promise

NONE = np.zeros(0)


def names(n):
    return [f"s{i:05d}" for i in range(n)]


def test_the_bound_is_the_last_share_before_the_first_that_fails():
    rng = np.random.default_rng(0)
    same = rng.random(1000) < 0.97
    bound = kept_bound(Promise("consistency", keep=0.5), NONE, NONE, same, names(1000), 0.95, 0)
    passed = [
        p_value(Promise("consistency", keep=k), NONE, NONE, same, names(1000), 0.95, 0).p <= 0.05
        for k in KEEPS.tolist()
    ]
    assert bound == KEEPS[passed.index(False) - 1]
    assert 0.94 < bound < 0.97
    nothing = np.zeros(1000, dtype=bool)
    assert kept_bound(Promise("consistency", keep=0.5), NONE, NONE, nothing, names(1000), 0.95, 0) is None


def test_the_bound_is_too_high_in_few_of_many_repetitions():
    """The truth lies between two shares of the grid; a bound above it breaks its word."""
    rng, broken, true = np.random.default_rng(1), 0, 0.9303
    for _ in range(400):
        full = (rng.random(400) < 0.7).astype(float)
        score = full * (rng.random(400) < true)
        bound = kept_bound(Promise("accuracy", keep=0.5), score, full, score == full, names(400), 0.9, 0)
        broken += bound is not None and bound > true
    assert 0 < broken / 400 <= 0.1 + 3 * np.sqrt(0.1 * 0.9 / 400)


@pytest.fixture(scope="module")
def case(make_trace, latency):
    trace, fresh = make_trace(n=900, clusters=300), make_trace(n=1500, seed=5)
    return trace, fresh, propose(trace, latency, [Promise("accuracy", keep=0.95)])


def decoder(trace, latency):
    def decode(policy):
        found = simulate(trace, policy, latency)
        return Decoded(trace.sample_ids, trace.clusters, found.score, found.same)

    return decode


@pytest.mark.parametrize("share", [0.9, 0.6])
def test_what_is_least_harmful_of_what_is_fast_enough(case, latency, share):
    trace, fresh, proposal = case
    budget = share * proposal.full_depth.ms
    chosen = within_budget(proposal, budget)
    fast = [c for c in (*proposal.frontier, *proposal.statics) if c.ms <= budget]
    assert min(c.used for c in chosen.worth_decoding) == min(c.used for c in fast)
    rehearsed = best_within(rehearse(chosen, trace, decoder(trace, latency)), budget)
    (link,) = rehearsed.chain
    assert link.ms <= budget
    assert link.used == min(c.used for c in chosen.worth_decoding)  # decoded as simulated here
    how = {"confidence_level": 0.95, "seed": 0, "provenance": Provenance()}
    policy, _ = certify_budget(rehearsed, decoder(fresh, latency), **how)
    assert policy.rules == link.policy.rules
    (evidence,) = policy.certificate.evidence
    assert policy.certificate.kind == "certified"
    score = simulate(fresh, policy, latency).score["accuracy"]
    full, same = fresh.full_score["accuracy"], np.ones(len(fresh), dtype=bool)
    assert evidence.promise.keep == kept_bound(evidence.promise, score, full, same, fresh.clusters, 0.95, 0)
    assert evidence.p_value <= 0.05
    assert evidence.promise.keep < evidence.kept == pytest.approx(score.mean() / full.mean())
    assert ExitPolicy.from_json(policy.to_json()) == policy


def test_nothing_is_fast_enough(case):
    _, _, proposal = case
    with pytest.raises(ValueError, match=r"No policy takes at most 0.1 ms; the fastest is predicted at"):
        within_budget(proposal, 0.1)


def test_too_little_can_be_shown(case, make_trace, latency):
    trace, _, proposal = case
    budget = 0.7 * proposal.full_depth.ms
    found = best_within(rehearse(within_budget(proposal, budget), trace, decoder(trace, latency)), budget)
    few = make_trace(n=3, seed=6)
    how = {"confidence_level": 0.95, "seed": 0, "provenance": Provenance()}
    policy, _ = certify_budget(found, decoder(few, latency), **how)
    assert policy.is_full_depth
    assert "Within the budget no 50% of full depth could be shown" in policy.certificate.in_words()
