"""Costs of depths, by the schedule itself: every call that it makes is paid for as it comes."""

from dataclasses import replace

import numpy as np
import pytest

from lightning_mue.calibration.cost import predicted_ms
from lightning_mue.calibration.propose import propose
from lightning_mue.inference.schedule import DecoderExits, decode
from lightning_mue.latency import DecoderLatency, LatencyTable, StreamLatency
from lightning_mue.policy import ExitRule
from lightning_mue.promise import Promise

LAYERS, STEPS = 6, 9
DECODER = DecoderLatency((1, 2, 4), (1.0, 1.5, 2.0), 0.3, 2.0, {"gate": 0.05, "margin": 1.1}, {"gate": 0.2})
TABLE = LatencyTable({"vision": StreamLatency(5.0, 1.0, {"gate": 0.1}, 0.4)}, DECODER, "made up", 1)


class Paying:
    """An executor that computes nothing and sums up what it would cost."""

    num_layers = LAYERS

    def __init__(self, rule, decoder=DECODER):
        self.ms, self.rule, self.decoder, self.reached = 0.0, rule, decoder, set()

    def embed(self, rows, first, tokens):
        pass

    def run_layer(self, layer, pending):
        base = layer <= self.decoder.base_layers
        for first, last, rows in pending:
            self.ms += len(rows) * float(self.decoder.layer_cost(np.array(last - first), base))
        self.ms += 0.0 if layer in self.reached or base else self.decoder.cross_ms
        self.reached.add(layer)

    def score(self, signal, layer, places):
        self.ms += DECODER.signal_ms[signal]
        return [float(self.left == layer)]

    def choose(self, exits):
        ((layer, places),) = exits.items()
        self.ms += DECODER.step_ms
        if self.rule is not None and layer in self.rule.layers:
            self.ms += DECODER.exit_ms.get(self.rule.signal, 0.0)
        return dict.fromkeys(places, 7)


@pytest.mark.parametrize("signal", [None, "gate"])
@pytest.mark.parametrize("prompt", [0, 3])
@pytest.mark.parametrize("base", [0, 2])
def test_a_decode_costs_what_its_schedule_asks_for(signal, prompt, base):
    """Also where the first layers are never left, read no memory and cost less."""
    decoder = replace(DECODER, base_layers=base, base_ms=(0.2, 0.3, 0.7) if base else ())
    first = base + 1
    rng, rule = np.random.default_rng(prompt), signal and ExitRule(signal, (first, 4, 5), (1.0, 1.0, 1.0))
    depths_BT = rng.choice([first, 4, 5, LAYERS], (20, STEPS))
    lengths_B = rng.integers(1, STEPS + 1, 20)
    depths_BT[np.arange(STEPS) >= lengths_B[:, None]] = 0
    paid = []
    for depths, length in zip(depths_BT.tolist(), lengths_B.tolist(), strict=True):
        executor = Paying(rule, decoder)
        forced = None if rule else [depths[:length]]

        def thresholds(step, executor=executor, depths=depths):
            executor.left = depths[step]
            return dict.fromkeys((first, 4, 5), 1.0)

        decode(executor, DecoderExits("gate", thresholds, forced=forced), [[2] * (prompt + 1)], (), length)
        paid.append(executor.ms)
    rules, table = {"decoder": rule} if rule else None, replace(TABLE, decoder=decoder)
    assert predicted_ms(table, {"decoder": depths_BT}, rules, prompt)["decoder"] == pytest.approx(paid)
    assert LatencyTable.from_json(table.to_json()) == table


def test_prompts_of_several_lengths_and_answers_that_are_empty():
    depths_BT = np.array([[2, 1], [1, 0], [0, 0]])
    found = predicted_ms(TABLE, {"decoder": depths_BT}, prompts=np.array([3, 0, 1]))["decoder"]
    first = 2 * (2.0 + 0.3) + 1.0 + 2 * 2.0  # four positions through two layers, then one through one
    assert found == pytest.approx([first, 1.0 + 0.3 + 2.0, 0.0])


def test_streams_left_once_per_sample():
    found = predicted_ms(TABLE, {"vision": np.array([1, 3, 4])}, {"vision": ExitRule("gate", (1, 2, 3), (0.5,) * 3)})
    assert found["vision"] == pytest.approx([5 + 1 + 0.1 + 0.4, 5 + 3 + 0.3 + 0.4, 5 + 4 + 0.3])
    assert predicted_ms(TABLE, {"vision": np.array([1, 3, 4])})["vision"] == pytest.approx([6.0, 8.0, 9.0])


def test_tokens_before_the_first_exit_ask_nothing():
    rule, depths = ExitRule("gate", (1,), (0.5,), from_step=2), {"decoder": np.array([[6, 6, 6, 1]])}
    asking = predicted_ms(TABLE, depths, {"decoder": rule})["decoder"] - predicted_ms(TABLE, depths)["decoder"]
    assert asking == pytest.approx([0.05 + 0.05 + 0.2])


def test_costs_that_were_not_measured_are_named():
    with pytest.raises(ValueError, match=r"no stream 'text', only \['vision'\]"):
        predicted_ms(TABLE, {"text": np.array([1])})
    with pytest.raises(ValueError, match=r"no cost of signal 'entropy' in stream 'decoder', only \['gate', 'margin'\]"):
        predicted_ms(TABLE, {"decoder": np.array([[1]])}, {"decoder": ExitRule("entropy", (1,), (0.5,))})


def slow(latency, **signal_ms):
    """Return the table with a decoder whose signals cost so much."""
    decoder = DecoderLatency((1, 8), (1.0, 2.5), 0.0, 2.0, latency.decoder.signal_ms | signal_ms, {"gate": 0.25})
    return LatencyTable(latency.streams, decoder)


def test_exits_that_cannot_win_are_left_out_and_said_so(make_trace, latency):
    """After layers 1, 2 and 4 of 6 a token spares 5, 4 and 2 ms: at 2.5 ms the last exit by gate cannot win."""
    trace, promises = make_trace(), [Promise("accuracy", keep=0.5)]
    plain, found = (propose(trace, table, promises) for table in (slow(latency), slow(latency, gate=2.25)))
    assert plain.refused == ()
    (words,) = found.refused
    assert words == "decoder: the exit after layer 4 by gate costs 2.5 ms a token and can save 2 ms"
    assert found.searched < plain.searched
    layers = {
        (rule.signal, k)
        for candidate in found.frontier
        for name, rule in candidate.policy.rules.items()
        if name == "decoder"
        for k in rule.layers
    }
    assert ("gate", 4) not in layers
    none = propose(trace, slow(latency, gate=50.0, similarity=50.0), promises)
    assert len(none.refused) == 6
    assert {c.policy.rules["decoder"].signal for c in none.frontier if "decoder" in c.policy.rules} <= {"static"}


def test_a_stream_left_once_is_judged_by_the_sample(make_trace, latency):
    """After layers 3, 6 and 9 of 12 a sample spares 27, 18 and 9 ms; its adapter counts too."""
    vision = StreamLatency(5.0, 3.0, {"gate": 8.5, "similarity": 0.02}, 0.5)
    table = LatencyTable(latency.streams | {"vision": vision}, latency.decoder)
    (words,) = propose(make_trace(), table, [Promise("accuracy", keep=0.5)]).refused
    assert words == "vision: the exit after layer 9 by gate costs 9 ms a sample and can save 9 ms"
