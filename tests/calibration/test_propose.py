import itertools

import numpy as np
import pytest

from lightning_mue.calibration.candidates import CAUTION
from lightning_mue.calibration.dials import DECAYS, GRID, Dials, stream_options
from lightning_mue.calibration.frontier import pareto, peel
from lightning_mue.calibration.propose import propose
from lightning_mue.calibration.rows import StreamRows
from lightning_mue.calibration.simulate import simulate
from lightning_mue.policy import ExitPolicy, ExitRule
from lightning_mue.promise import Promise
from lightning_mue.trace import Trace


def bytes_of(proposal):
    candidates = [*proposal.chain, *proposal.frontier, *proposal.statics]
    return [(c.policy.to_json(), c.used, c.ms, c.score, c.depths) for c in candidates]


def test_pareto_equals_comparing_all_pairs():
    rng = np.random.default_rng(0)
    for _ in range(50):
        risk, ms = rng.integers(0, 6, 12).astype(float), rng.integers(0, 6, 12).astype(float)
        points = list(zip(risk, ms, strict=True))
        best = {p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
        found = pareto(risk, ms)
        assert {points[i] for i in found} == best
        assert len(found) == len(best)
        assert all(points.index(points[i]) == i for i in found)  # ties: the first
        assert (np.diff(risk[found]) > 0).all()
        assert (np.diff(ms[found]) < 0).all()
        assert set(found) <= set(peel(risk, ms, 5))
        assert len(peel(risk, ms, 5)) >= 5
    assert pareto(np.zeros(0), np.zeros(0)).tolist() == []


@pytest.mark.parametrize("levels", [1000, 10])  # with 10 levels many scores are equal, and equal scores leave together
def test_dial_takes_the_smallest_threshold_that_does_little_harm(make_trace, levels):
    trace = make_trace(n=200, seed=2, difficulty=0.6)
    stream = trace.streams["vision"]
    stream.scores["gate"] = (np.round(stream.scores["gate"] * levels) / levels).astype(np.float32)
    for gamma in (0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3):
        rule = Dials(StreamRows.of(trace, "vision"), "gate").rule(gamma)
        left_in = np.ones(200, dtype=bool)
        for column, layer in enumerate(stream.layers):
            scores, harm = stream.scores["gate"][:, column], ~stream.same_at[:, column]
            allowed = [
                t
                for t in scores[left_in]
                if (harm[left_in & (scores >= t)].sum() + 0.5) / ((left_in & (scores >= t)).sum() + 1) <= gamma
            ]
            found = rule.reachable.get(layer) if rule else None
            assert (found is None) == (not allowed)
            if allowed:
                assert found <= min(allowed) < found + GRID
                assert np.float32(found) == found
                left_in &= scores < found


def test_a_falling_dial_does_as_little_harm(make_trace):
    """Its first exit takes the smallest base threshold that does, found here by trying every one that matters."""
    trace = make_trace(n=200, seed=2, difficulty=0.6)
    trace.meta["decode"] = {"max_new_tokens": 6}
    rows, (beta, tau) = StreamRows.of(trace, "decoder"), DECAYS[0]
    for gamma in (0.03, 0.1, 0.2):
        rule = Dials(rows, "gate", DECAYS[0]).rule(gamma)
        rise = (1 - beta) * np.exp(-tau * rows.step / 6)
        scores, harm = rows.scores["gate"][0].astype(np.float64), rows.harm[0]
        allowed = [
            base
            for base in (scores - rise) / beta
            if base <= 1
            and (harm[leaves := scores >= beta * base + rise - 1e-9].sum() + 0.5) / (leaves.sum() + 1) <= gamma
        ]
        assert rule.decay == DECAYS[0]
        assert rule.reachable[1] == pytest.approx(max(min(allowed), 0), abs=2 * GRID)
    assert all(t <= 1 for t in rule.thresholds)
    assert {rule.decay for rule in stream_options(rows, np.array([0.1])) if rule} == {None, *DECAYS}
    assert {rule.decay for rule in stream_options(StreamRows.of(trace, "vision"), np.array([0.1])) if rule} == {None}


def test_a_bolder_dial_leaves_earlier(make_trace, latency):
    trace = make_trace()
    depth, dials = [], Dials(StreamRows.of(trace, "decoder"), "gate")
    for gamma in (0.005, 0.05, 0.5):
        rule = dials.rule(gamma)
        depth.append(simulate(trace, ExitPolicy({"decoder": rule} if rule else {}), latency).ms.mean())
    assert depth[0] > depth[1] > depth[2]
    assert dials.rule(1e-9) is None  # too little data to allow anything


def test_options_hold_every_static_depth(make_trace):
    trace = make_trace(n=200, seed=2, difficulty=0.6)
    options = stream_options(StreamRows.of(trace, "vision"), np.array([0.01, 0.1, 0.3]))
    assert options[0] is None
    for signal in trace.streams["vision"].scores:  # at every exit, and at each alone
        asked = {rule.layers for rule in options if rule and rule.signal == signal}
        assert {(3,), (6,), (9,)} <= asked
        assert max(map(len, asked)) > 1
    assert {ExitRule.static(k) for k in (3, 6, 9)} <= set(options)
    assert len(options) == len(set(options))


@pytest.mark.parametrize(("metric", "keep"), [("accuracy", 0.95), ("consistency", 0.9)])
def test_chain_goes_from_safe_to_bold(make_trace, latency, metric, keep):
    trace = make_trace(n=600, clusters=200)
    proposal = propose(trace, latency, [Promise(metric, keep)])
    chain = proposal.chain
    assert 3 <= len(chain) <= 10
    assert (np.diff([c.used for c in chain]) > 0).all()
    assert (np.diff([c.ms for c in chain]) < 0).all()
    assert chain[0].ms < proposal.full_depth.ms
    assert chain[-1].used <= 1.1
    assert all(c.policy.fingerprint == "abc" and c.policy.certificate is None for c in chain)
    assert all(c in proposal.frontier for c in chain)


@pytest.mark.parametrize("metric", ["accuracy", "consistency"])
def test_predictions_are_those_of_simulate_and_of_the_test(make_trace, latency, metric):
    trace = make_trace(n=300, clusters=100)
    proposal = propose(trace, latency, [Promise(metric, 0.9)])
    assert proposal.full_depth.used == pytest.approx(0)
    assert proposal.full_depth.policy.is_full_depth
    for candidate in [*proposal.chain, *proposal.statics]:
        found = simulate(trace, candidate.policy, latency)
        assert candidate.ms == pytest.approx(found.ms.mean())
        steps = found.depths["decoder"][found.depths["decoder"] > 0]
        assert candidate.depths["decoder"] == pytest.approx(steps.mean())
        kept = candidate.score["accuracy"] / proposal.full_depth.score["accuracy"]
        if metric == "accuracy":  # used 1 = exactly the promise, with caution for what luck may hide
            drop = trace.full_score["accuracy"] - found.score["accuracy"]
            drops = [
                np.mean([drop[i] for i in range(300) if trace.clusters[i] == c]) for c in sorted(set(trace.clusters))
            ]
            luck = CAUTION * np.std(drops) / np.sqrt(len(drops)) / proposal.full_depth.score["accuracy"]
            assert candidate.used == pytest.approx((max(1 - kept, 0) + luck) / 0.1)


def test_no_combination_of_options_beats_the_frontier(make_trace, latency):
    trace = make_trace(n=80, steps=4)
    proposal = propose(trace, latency, [Promise("consistency", 0.9)], dials=3)
    gammas = np.geomspace(0.1 / 30, 0.5, 3)
    choices = [stream_options(StreamRows.of(trace, name), gammas) for name in sorted(trace.streams)]
    for rules in itertools.product(*choices):
        policy = ExitPolicy({n: r for n, r in zip(sorted(trace.streams), rules, strict=True) if r})
        found = simulate(trace, policy, latency)
        risk, ms = (~found.same).mean(), found.ms.mean()
        assert any(1 - c.same <= risk + 1e-9 and c.ms <= ms * 1.01 for c in proposal.frontier)


def test_statics_are_reported_and_compete(make_trace, latency):
    trace = make_trace(n=200)
    for stream in trace.streams.values():  # useless signals, and the first exit always agrees
        for scores in stream.scores.values():
            scores[:] = 0.5
    for stream in (trace.streams["decoder"], trace.streams["vision"]):
        stream.same_at[:] = True
        stream.score_at["accuracy"][:] = trace.full_score["accuracy"][:, None]
    trace.streams["decoder"].agree[:] = True
    proposal = propose(trace, latency, [Promise("accuracy", 0.95)])
    best = proposal.frontier[0].policy.rules
    assert (best["decoder"], best["vision"]) == (ExitRule.static(1), ExitRule.static(3))
    statics = [c.policy for c in proposal.statics]
    assert statics[0].is_full_depth
    assert len(statics) == 1 + 3 + 2 + 3


def test_nothing_slower_than_full_depth_is_in_the_chain(make_trace, latency):
    trace = make_trace(n=200)
    decoder = latency.decoder
    dear = type(decoder)((1, 2), (0.0, 0.0), 0.0, 1.0, {"gate": 5.0, "similarity": 5.0})
    streams = {k: type(s)(1.0, 0.0, {"gate": 5.0, "similarity": 5.0}) for k, s in latency.streams.items()}
    proposal = propose(trace, type(latency)(streams, dear), [Promise("accuracy", 0.95)])
    assert proposal.chain == []


def test_a_trace_without_exits_or_of_another_metric(make_trace, latency):
    trace = make_trace(n=50)
    with pytest.raises(ValueError, match=r"holds scores of \['accuracy'\], the promise is about 'exact_match'"):
        propose(trace, latency, [Promise("exact_match", 0.95)])
    trace.streams = {}
    assert propose(trace, latency, [Promise("accuracy", 0.95)]).chain == []


@pytest.mark.parametrize("metric", ["accuracy", "consistency"])
def test_same_policy_bytes_for_any_world_size_order_and_repeats(make_trace, latency, metric):
    trace = make_trace(n=240, clusters=120)
    expected = propose(trace, latency, [Promise(metric, 0.95)])
    rng = np.random.default_rng(0)
    for world in (1, 2, 3, 8):
        order = rng.permutation(240)
        shards = [trace.select(order[rank::world]) for rank in range(world)]
        shards.append(trace.select(order[:7]))  # the sampler's padding
        for shard in shards:  # every rank pads to the steps it needs
            steps = int(shard.lengths.max())
            decoder = shard.streams["decoder"]
            decoder.agree = decoder.agree[:, :steps]
            decoder.scores = {k: v[:, :steps] for k, v in decoder.scores.items()}
        found = propose(
            Trace.merge([shards[i] for i in rng.permutation(len(shards))]), latency, [Promise(metric, 0.95)]
        )
        assert bytes_of(found) == bytes_of(expected)
        assert found.chain_hash == expected.chain_hash
    unmerged = propose(trace.select(np.r_[rng.permutation(240), 0, 0, 5]), latency, [Promise(metric, 0.95)])
    assert bytes_of(unmerged) == bytes_of(expected)


def test_last_bits_of_the_scores_do_not_matter(make_trace, latency):
    trace, other = make_trace(n=200), make_trace(n=200)
    grid = 2.0**-10
    for noisy, shift in ((trace, 0.5), (other, 0.5 + 2.0**-13)):  # far from the edges of the threshold grid
        for stream in noisy.streams.values():
            stream.scores = {
                k: (np.floor(v / grid).clip(0, 1000) * grid + shift * GRID).astype(np.float32)
                for k, v in stream.scores.items()
            }
    first, second = (propose(t, latency, [Promise("accuracy", 0.95)]) for t in (trace, other))
    assert bytes_of(first) == bytes_of(second)
