"""Rehearsing: what simulation proposes is judged by what it really did, on the same samples."""

import itertools

import numpy as np
import pytest

from lightning_mue.calibration import Decoded, propose, rehearse, simulate
from lightning_mue.calibration.candidates import CAUTION
from lightning_mue.calibration.dials import stream_options
from lightning_mue.calibration.rows import StreamRows
from lightning_mue.policy import ExitPolicy, ExitRule
from lightning_mue.promise import Promise

KEEP = 0.9


def decoder(trace, latency, harm):
    """Decode as simulated, but ``harm`` says how many more answers come out wrong for a policy."""

    def decode(policy):
        found = simulate(trace, policy, latency)
        score, same = found.score["accuracy"].copy(), found.same.copy()
        right = np.flatnonzero(score > 0)[: int(harm(policy) * len(score))]
        score[right], same[right] = 0.0, False
        order = np.random.default_rng(len(policy.rules)).permutation(len(score))  # ranks answer in any order
        ids, clusters = np.array(trace.sample_ids)[order], np.array(trace.clusters)[order]
        return Decoded(ids.tolist(), clusters.tolist(), {"accuracy": score[order]}, same[order])

    return decode


def half_used(trace, policy, latency):
    """The part of the allowed loss that a policy of one stream uses, with the standard errors that luck may hide."""
    found = simulate(trace, policy, latency)
    full = trace.full_score["accuracy"]
    drop = full - found.score["accuracy"]
    drops = [drop[np.array(trace.clusters) == c].mean() for c in sorted(set(trace.clusters))]
    cautious = max(np.mean(drops), 0) + CAUTION * np.std(drops) / np.sqrt(len(drops))
    full = np.mean([full[np.array(trace.clusters) == c].mean() for c in sorted(set(trace.clusters))])
    return cautious / ((1 - KEEP) * full)


@pytest.fixture
def trace(make_trace):
    return make_trace(n=600, clusters=200)


@pytest.mark.parametrize("metric", ["accuracy", "consistency"])
def test_the_chain_is_ordered_by_what_policies_did(trace, latency, metric):
    """Streams that harm each other: together far worse than each alone, which no simulation knows."""
    proposal = propose(trace, latency, [Promise(metric, KEEP)])
    harm = {1: 0.0, 2: 0.01, 3: 0.15}
    decode = decoder(trace, latency, lambda policy: harm[len(policy.rules)])
    assert max(len(link.policy.rules) for link in proposal.chain) == 3
    rehearsed = rehearse(proposal, trace, decode)
    assert 0 < len(rehearsed.chain) <= len(proposal.worth_decoding)
    assert all(len(link.policy.rules) < 3 for link in rehearsed.chain)  # 15 % of wrong answers break the promise
    for link in rehearsed.chain:
        found = decode(link.policy).in_order()
        of = np.array(found.clusters)
        means = [found.scores["accuracy"][of == c].mean() for c in sorted(set(found.clusters))]
        assert link.score["accuracy"] == pytest.approx(np.mean(means), abs=1e-12)
        assert link.same == pytest.approx(np.mean([found.same[of == c].mean() for c in sorted(set(found.clusters))]))
        assert link.ms == pytest.approx(simulate(trace, link.policy, latency).ms.mean())
    for safe, bold in itertools.pairwise(rehearsed.chain):
        assert safe.used < bold.used
        assert safe.ms > bold.ms


def test_where_simulation_was_right_nothing_changes(trace, latency):
    proposal = propose(trace, latency, [Promise("accuracy", KEEP)])
    rehearsed = rehearse(proposal, trace, decoder(trace, latency, lambda policy: 0.0))
    assert [link.policy for link in rehearsed.chain] == [link.policy for link in proposal.chain]
    assert [link.used for link in rehearsed.chain] == pytest.approx([link.used for link in proposal.chain])


def test_fewer_streams_are_worth_decoding_too(trace, latency):
    proposal = propose(trace, latency, [Promise("accuracy", KEEP)])
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
    trace.streams["vision"].score_at["accuracy"][:, 0], trace.streams["vision"].same_at[:, 0] = 0.0, False
    proposal = propose(trace, latency, [Promise("accuracy", KEEP)])
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
    proposal = propose(trace, latency, [Promise("accuracy", KEEP)])
    one = Decoded(["other"], ["other"], {"accuracy": np.ones(1)}, np.ones(1, dtype=bool))
    with pytest.raises(ValueError, match="decoded on the 600 samples of the trace"):
        rehearse(proposal, trace, lambda policy: one)


def test_no_combination_is_worth_decoding_twice(make_trace, latency):
    """Where only the decoder may leave, every choice of streams comes down to that."""
    trace = make_trace(n=600, clusters=200)
    for name in ("vision", "encoder"):
        trace.streams[name].score_at["accuracy"][:] = 0.0
        trace.streams[name].same_at[:] = False
    found = [c.policy for c in propose(trace, latency, [Promise("accuracy", KEEP)]).worth_decoding]
    assert len({policy.to_json() for policy in found}) == len(found)
    assert all(policy.rules for policy in found)
