"""Rehearsing: what simulation proposes is judged by what it really did, on the same samples."""

import itertools

import numpy as np
import pytest

from lightning_mue.calibration import Decoded, p_value, propose, rehearse, simulate
from lightning_mue.calibration.candidates import CAUTION
from lightning_mue.calibration.dials import stream_options
from lightning_mue.calibration.rows import StreamRows
from lightning_mue.policy import ExitPolicy, ExitRule

KEEP = 0.9


def decoder(trace, latency, harm):
    """Decode as simulated, but ``harm`` says how many more answers come out wrong for a policy."""

    def decode(policy):
        found = simulate(trace, policy, latency)
        score, same = found.score.copy(), found.same.copy()
        right = np.flatnonzero(score > 0)[: int(harm(policy) * len(score))]
        score[right], same[right] = 0.0, False
        order = np.random.default_rng(len(policy.rules)).permutation(len(score))  # ranks answer in any order
        ids, clusters = np.array(trace.sample_ids)[order], np.array(trace.clusters)[order]
        return Decoded(ids.tolist(), clusters.tolist(), score[order], same[order])

    return decode


def half_used(trace, policy, latency):
    """The part of the allowed loss that a policy of one stream uses, with the standard errors that luck may hide."""
    found = simulate(trace, policy, latency)
    drop = trace.full_score - found.score
    drops = [drop[np.array(trace.clusters) == c].mean() for c in sorted(set(trace.clusters))]
    cautious = max(np.mean(drops), 0) + CAUTION * np.std(drops) / np.sqrt(len(drops))
    full = np.mean([trace.full_score[np.array(trace.clusters) == c].mean() for c in sorted(set(trace.clusters))])
    return cautious / ((1 - KEEP) * full)


@pytest.fixture
def trace(make_trace):
    return make_trace(n=600, clusters=200)


@pytest.mark.parametrize("metric", ["accuracy", "consistency"])
def test_the_chain_is_ordered_by_what_policies_did(trace, latency, metric):
    """Streams that harm each other: together far worse than each alone, which no simulation knows."""
    proposal = propose(trace, latency, metric, KEEP, 0.95)
    harm = {1: 0.0, 2: 0.01, 3: 0.15}
    decode = decoder(trace, latency, lambda policy: harm[len(policy.rules)])
    assert max(len(link.policy.rules) for link in proposal.chain) == 3
    rehearsed = rehearse(proposal, trace, decode)
    assert 0 < len(rehearsed.chain) <= len(proposal.worth_decoding)
    assert all(len(link.policy.rules) < 3 for link in rehearsed.chain)  # 15 % of wrong answers break the promise
    for link in rehearsed.chain:
        found = decode(link.policy).in_order()
        full = trace.full_score[np.argsort(trace.sample_ids)]
        result = p_value(metric, found.scores, full, found.same, found.clusters, KEEP, 0.95, 0)
        assert link.risk == pytest.approx(result.mean_loss, abs=1e-12)
        assert link.ms == pytest.approx(simulate(trace, link.policy, latency).ms.mean())
    for safe, bold in itertools.pairwise(rehearsed.chain):
        assert safe.used < bold.used
        assert safe.ms > bold.ms


def test_where_simulation_was_right_nothing_changes(trace, latency):
    proposal = propose(trace, latency, "accuracy", KEEP, 0.95)
    rehearsed = rehearse(proposal, trace, decoder(trace, latency, lambda policy: 0.0))
    assert [link.policy for link in rehearsed.chain] == [link.policy for link in proposal.chain]
    assert [link.risk for link in rehearsed.chain] == pytest.approx([link.risk for link in proposal.chain])


def test_fewer_streams_are_worth_decoding_too(trace, latency):
    proposal = propose(trace, latency, "accuracy", KEEP, 0.95)
    links = [link.policy for link in proposal.chain]
    assert [c.policy for c in proposal.worth_decoding[: len(links)]] == links
    more = [c for c in proposal.worth_decoding if c.policy not in links]
    few = [c for c in more if any(rule.signal != "static" for rule in c.policy.rules.values())]
    assert {len(c.policy.rules) for c in few} == {1, 2}
    assert all(c.used < 1 for c in few)
    for c in few:
        if len(c.policy.rules) == 1:  # of this stream alone, the fastest that uses at most half
            (name,) = c.policy.rules
            options = [
                rule
                for rule in stream_options(StreamRows.of(trace, name), np.geomspace((1 - KEEP) / 30, 0.5, 12))
                if rule
            ]
            allowed = [rule for rule in options if half_used(trace, ExitPolicy({name: rule}), latency) <= 0.5]
            times = [simulate(trace, ExitPolicy({name: rule}), latency).ms.mean() for rule in allowed]
            assert c.ms == pytest.approx(min(times))


def test_static_depths_are_worth_decoding_even_bold_ones(trace, latency):
    """The fastest that no other beats in summed risk and time, up to twice the allowed loss; by trying all of them."""
    trace.streams["vision"].score_at[:, 0], trace.streams["vision"].same_at[:, 0] = 0.0, False
    proposal = propose(trace, latency, "accuracy", KEEP, 0.95)
    rules = [[None, *map(ExitRule.static, trace.streams[name].layers)] for name in sorted(trace.streams)]
    found = []
    for choice in itertools.product(*rules):
        named = {name: rule for name, rule in zip(sorted(trace.streams), choice, strict=True) if rule}
        policy = ExitPolicy(named)
        alone = sum(half_used(trace, ExitPolicy({name: rule}), latency) for name, rule in named.items())
        found.append((simulate(trace, policy, latency).ms.mean(), alone, half_used(trace, policy, latency), named))
    front = [a for a in found if not any(b[:2] != a[:2] and b[0] <= a[0] and b[1] <= a[1] for b in found)]
    wanted = [named for _, _, used, named in sorted(front, key=lambda f: f[0]) if used <= 2 and named]
    decoded = [dict(c.policy.rules) for c in proposal.worth_decoding]
    assert len(wanted) > 1
    assert all(named in decoded for named in wanted[:6])
    bolder = [named for _, _, used, named in front if used > 2]
    assert bolder
    assert not any(named in decoded for named in bolder)


def test_other_samples_are_refused(trace, latency):
    proposal = propose(trace, latency, "accuracy", KEEP, 0.95)
    one = Decoded(["other"], ["other"], np.ones(1), np.ones(1, dtype=bool))
    with pytest.raises(ValueError, match="decoded on the 600 samples of the trace"):
        rehearse(proposal, trace, lambda policy: one)


def test_no_combination_is_worth_decoding_twice(make_trace, latency):
    """Where only the decoder may leave, every choice of streams comes down to that."""
    trace = make_trace(n=600, clusters=200)
    for name in ("vision", "encoder"):
        trace.streams[name].score_at[:] = 0.0
        trace.streams[name].same_at[:] = False
    found = [c.policy for c in propose(trace, latency, "accuracy", KEEP, 0.95).worth_decoding]
    assert len({policy.to_json() for policy in found}) == len(found)
    assert all(policy.rules for policy in found)
