import math

import numpy as np
import pytest

from lightning_mue.calibration.simulate import simulate
from lightning_mue.latency import DecoderLatency, LatencyTable
from lightning_mue.policy import ExitPolicy, ExitRule

STEPS = 6  # at most, in an answer


def leave_at(stream, rule, scores, step=0):
    """Return the exit layer and how many exits were tried, by plain reading of the rule."""
    tried = 0
    for column, layer in enumerate(stream.layers):
        threshold = rule.reachable.get(layer) if rule and step >= rule.from_step else None
        if threshold is not None and rule.decay:
            beta, tau = rule.decay
            threshold = beta * threshold + (1 - beta) * math.exp(-tau * step / STEPS)
        if threshold is None or threshold == math.inf:
            continue
        tried += 1
        score = 1.0 if rule.signal == "static" else scores[rule.signal][column]
        if score >= np.float32(threshold):
            return layer, tried
    return stream.num_layers, tried


def one_decoder(trace, i, rule, cost):
    stream = trace.streams["decoder"]
    computed = {layer: set() for layer in range(1, stream.num_layers + 1)}
    ms, depths, first = 0.0, [], None
    for t in range(int(trace.lengths[i])):
        depth, tried = leave_at(stream, rule, {k: v[i, t] for k, v in stream.scores.items()}, t)
        ms += cost.step_ms + tried * (0.0 if rule is None else cost.signal_ms.get(rule.signal, 0.0))
        for layer in range(1, depth + 1):
            if not computed[layer]:
                ms += cost.cross_ms
            block = set(range(t + 1)) - computed[layer]
            ms += float(cost.layer_cost(np.array(len(block))))
            computed[layer] |= block
        if depth < stream.num_layers and not stream.agree[i, t, stream.layers.index(depth)] and first is None:
            first = depth
        depths.append(depth)
    change = (
        0.0
        if first is None
        else stream.score_at["accuracy"][i, stream.layers.index(first)] - trace.full_score["accuracy"][i]
    )
    return depths, sum(len(c) for c in computed.values()), first is None, change, ms


def brute_force(trace, policy, latency, i):
    depths, pairs, same, change, ms = one_decoder(trace, i, policy.rules.get("decoder"), latency.decoder)
    all_depths = {"decoder": depths}
    for name in ("encoder", "vision"):
        stream, rule, cost = trace.streams[name], policy.rules.get(name), latency.streams[name]
        depth, tried = leave_at(stream, rule, {k: v[i] for k, v in stream.scores.items()})
        ms += cost.fixed_ms + depth * cost.layer_ms
        ms += tried * (0.0 if rule is None else cost.signal_ms.get(rule.signal, 0.0))
        if depth < stream.num_layers:
            column = stream.layers.index(depth)
            if not stream.same_at[i, column]:
                same = False
                change += stream.score_at["accuracy"][i, column] - trace.full_score["accuracy"][i]
        all_depths[name] = depth
    return all_depths, pairs, same, min(1.0, max(0.0, trace.full_score["accuracy"][i] + change)), ms


RULES = {
    "full depth": {},
    "one": {"decoder": ExitRule("gate", (1, 2, 4), (0.9, 0.8, 0.7))},
    "gaps": {"decoder": ExitRule("similarity", (2, 4), (math.inf, 0.9)), "vision": ExitRule("gate", (6,), (0.7,))},
    "static": {"decoder": ExitRule.static(2), "encoder": ExitRule.static(4), "vision": ExitRule.static(3)},
    "falling": {"decoder": ExitRule("gate", (1, 2, 4), (0.8, 0.7, math.inf), decay=(0.8, 2.0))},
    "from a step on": {"decoder": ExitRule("gate", (1, 4), (0.8, 0.7), from_step=2)},
    "last layer": {"decoder": ExitRule("gate", (4, 6), (0.8, 0.0)), "encoder": ExitRule.static(6)},
    "all": {
        "decoder": ExitRule("gate", (1, 4), (0.85, 0.6)),
        "encoder": ExitRule("similarity", (2, 4), (0.9, 0.8)),
        "vision": ExitRule("gate", (3, 6, 9), (0.8, math.inf, 0.5)),
    },
}


@pytest.mark.parametrize("name", RULES)
def test_equals_plain_loops(make_trace, latency, name):
    trace, policy = make_trace(n=60, seed=3, difficulty=0.6), ExitPolicy(RULES[name])
    trace.meta["decode"] = {"max_new_tokens": STEPS}
    rng = np.random.default_rng(0)
    for stream in trace.streams.values():  # every exit has a score of its own, so that taking a wrong one shows
        stream.score_at = {"accuracy": rng.random(stream.same_at.shape)}
    found = simulate(trace, policy, latency)
    for i in range(len(trace)):
        depths, pairs, same, score, ms = brute_force(trace, policy, latency, i)
        steps = trace.lengths[i]
        assert found.depths["decoder"][i, :steps].tolist() == depths["decoder"]
        assert not found.depths["decoder"][i, steps:].any()
        assert (found.depths["encoder"][i], found.depths["vision"][i]) == (depths["encoder"], depths["vision"])
        assert found.pairs[i] == pairs
        assert found.same[i] == same
        assert found.score["accuracy"][i] == pytest.approx(score, abs=1e-12)
        assert found.ms[i] == pytest.approx(ms, rel=1e-12)
    assert name not in ("one", "static", "all") or not found.same.all()  # disagreement is among the cases


def test_full_depth_changes_nothing(make_trace, latency):
    trace = make_trace(n=40)
    found = simulate(trace, ExitPolicy.full_depth(), latency)
    assert found.same.all()
    assert (found.score["accuracy"] == trace.full_score["accuracy"]).all()
    assert (found.pairs == trace.lengths * 6).all()
    out_of_reach = ExitPolicy({"decoder": ExitRule("gate", (1, 2, 4), (math.inf,) * 3)})
    assert (simulate(trace, out_of_reach, latency).ms == found.ms).all()  # exits never taken are not tried


def test_each_pair_is_computed_at_most_once(make_trace, latency):
    trace = make_trace(n=100, steps=9)
    depths = simulate(trace, ExitPolicy(RULES["one"]), latency)
    for i, row in enumerate(depths.depths["decoder"]):
        last = [max((t + 1 for t in range(9) if row[t] >= layer), default=0) for layer in range(1, 7)]
        assert depths.pairs[i] == sum(last)
    assert (depths.pairs <= trace.lengths * 6).all()


def test_the_first_differing_step_decides_the_score(make_trace, latency):
    trace = make_trace(n=1)
    stream = trace.streams["decoder"]
    trace.lengths[:], trace.full_score["accuracy"][:] = 4, 1.0
    stream.scores["gate"][0] = [[0, 0, 0]] * 6
    stream.scores["gate"][0, 1], stream.scores["gate"][0, 3] = [0, 1, 0], [1, 0, 0]  # leave at 2, then at 1
    stream.agree[:] = True
    stream.agree[0, 1, 1] = stream.agree[0, 3, 0] = False
    stream.score_at["accuracy"][0] = [0.1, 0.6, 0.9]
    found = simulate(trace, ExitPolicy({"decoder": ExitRule("gate", (1, 2, 4), (0.5, 0.5, 0.5))}), latency)
    assert found.depths["decoder"][0].tolist() == [6, 2, 6, 1, 0, 0]
    assert found.score["accuracy"][0] == pytest.approx(0.6)


def test_padding_is_never_read(make_trace, latency):
    trace = make_trace(n=50, seed=1)
    policy = ExitPolicy(RULES["all"])
    before = simulate(trace, policy, latency)
    stream = trace.streams["decoder"]
    rubbish = np.arange(6) >= trace.lengths[:, None]
    stream.agree[rubbish] = False
    stream.scores["gate"][rubbish] = 1.0
    after = simulate(trace, policy, latency)
    assert (before.ms == after.ms).all()
    assert (before.same == after.same).all()


def test_thresholds_have_the_precision_of_the_scores(make_trace, latency):
    trace = make_trace(n=10)
    trace.streams["vision"].scores["gate"][:] = np.float32(0.9)  # a little below 0.9 in float64
    found = simulate(trace, ExitPolicy({"vision": ExitRule("gate", (3,), (0.9,))}), latency)
    assert (found.depths["vision"] == 3).all()


def test_what_does_not_fit_is_refused(make_trace, latency):
    trace = make_trace(n=5)
    cases = {
        "streams .'audio'.": {"audio": ExitRule.static(1)},
        "after layer 3; the trace has exits after": {"decoder": ExitRule.static(3)},
        "reads signal 'margin', the trace holds": {"decoder": ExitRule("margin", (1,), (0.5,))},
    }
    costs = {"gate": 0.1, "margin": 0.1}
    table = LatencyTable(latency.streams, DecoderLatency((1,), (1.0,), 0.0, 0.0, costs))
    falling = ExitRule("gate", (1,), (0.5,), decay=(0.9, 4.0))
    cases["change with the step, and the trace does not say how long"] = {"decoder": falling}
    for message, rules in cases.items():
        with pytest.raises(ValueError, match=message):
            simulate(trace, ExitPolicy(rules), table)
    with pytest.raises(ValueError, match=r"no cost of signal 'similarity' in stream 'decoder'.*measure it again"):
        simulate(trace, ExitPolicy({"decoder": ExitRule("similarity", (1,), (0.5,))}), table)
    with pytest.raises(ValueError, match="no stream 'encoder'"):
        simulate(trace, ExitPolicy(), LatencyTable({}, latency.decoder))
