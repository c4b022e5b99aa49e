"""Lower precision competes with leaving early."""

from dataclasses import replace

import numpy as np
import pytest

from lightning_mue.calibration import Decoded, propose, rehearse, simulate
from lightning_mue.calibration.budget import within_budget
from lightning_mue.calibration.precision import with_precision
from lightning_mue.latency import LatencyTable
from lightning_mue.promise import Promise


def scaled(latency, factor):
    """Return the table of a device on which everything takes ``factor`` times as long."""
    streams = {
        name: replace(s, fixed_ms=s.fixed_ms * factor, layer_ms=s.layer_ms * factor, signal_ms=times(s, factor))
        for name, s in latency.streams.items()
    }
    d = latency.decoder
    decoder = replace(
        d,
        layer_ms=tuple(ms * factor for ms in d.layer_ms),
        cross_ms=d.cross_ms * factor,
        step_ms=d.step_ms * factor,
        signal_ms=times(d, factor),
    )
    return LatencyTable(streams, decoder)


def times(cost, factor):
    return {signal: ms * factor for signal, ms in cost.signal_ms.items()}


@pytest.fixture(scope="module")
def case(make_trace, latency):
    trace = make_trace(n=600, clusters=200)
    return trace, propose(trace, latency, [Promise("accuracy", keep=0.9)])


def test_every_policy_and_full_depth_in_half_the_time(case, latency):
    trace, proposal = case
    found = with_precision(proposal, trace, scaled(latency, 0.5), "bfloat16").worth_decoding
    plain, lower = ([c for c in found if c.policy.precision == p] for p in (None, "bfloat16"))
    assert plain == proposal.worth_decoding
    assert [c.policy.rules for c in lower] == [c.policy.rules for c in (proposal.full_depth, *plain)]
    for twin, one in zip(lower, (proposal.full_depth, *plain), strict=True):
        assert twin.ms == pytest.approx(one.ms / 2)
        assert twin.policy.depths_in_words() == f"{one.policy.depths_in_words()}; in bfloat16"


def test_what_is_slower_than_the_plain_model_is_not_decoded(case, latency):
    trace, proposal = case
    assert with_precision(proposal, trace, scaled(latency, 9.0), "bfloat16") == proposal


@pytest.mark.parametrize("harm", [0.0, 0.3])
def test_rehearsing_takes_it_if_it_is_harmless(case, latency, harm):
    trace, proposal = case
    both = with_precision(proposal, trace, scaled(latency, 0.5), "bfloat16")

    def decode(policy):
        found = simulate(trace, replace(policy, precision=None), latency)
        lost = np.arange(len(trace)) < (harm * len(trace) if policy.precision else 0)
        score = {"accuracy": np.where(lost, 0.0, found.score["accuracy"])}
        return Decoded(trace.sample_ids, trace.clusters, score, found.same & ~lost)

    chain = rehearse(both, trace, decode).chain
    assert chain
    assert {c.policy.precision for c in chain} == ({"bfloat16"} if not harm else {None})


def test_it_is_timed_on_the_groups_that_are_promised_for(make_trace, latency):
    """Long answers would make a precision look fast that is slow for the short ones, and the other way round."""
    trace = make_trace(n=300)
    trace.groups = ["long" if k > 4 else "short" for k in trace.lengths]
    for groups in (["long"], ["short"]):
        proposal = propose(trace, latency, [Promise("accuracy", keep=0.9)], groups)
        twins = with_precision(proposal, trace, scaled(latency, 0.5), "bfloat16").worth_decoding
        full = next(c for c in twins if c.policy.precision and not c.policy.rules)
        assert full.ms == pytest.approx(proposal.full_depth.ms / 2)
        assert full.policy.groups == tuple(groups)


def test_a_budget_that_only_it_can_meet(case, latency):
    trace, proposal = case
    budget = 0.9 * min(c.ms for c in (*proposal.frontier, *proposal.statics))
    with pytest.raises(ValueError, match="No policy takes at most"):
        within_budget(proposal, budget)
    found = within_budget(with_precision(proposal, trace, scaled(latency, 0.3), "bfloat16"), budget)
    assert {c.policy.precision for c in found.worth_decoding} == {"bfloat16"}
    assert all(c.ms <= budget for c in found.worth_decoding)
