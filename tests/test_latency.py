import numpy as np
import pytest

from lightning_mue.inference.profile import measure_decoder
from lightning_mue.latency import DecoderLatency, LatencyTable, StreamLatency
from lightning_mue.policy import ExitPolicy


def example():
    decoder = DecoderLatency((1, 2, 4), (1.0, 1.5, 2.0), 0.3, 2.0, {"gate": 0.05})
    return LatencyTable({"vision": StreamLatency(5.0, 1.0, {"gate": 0.1})}, decoder, "laptop", 2)


def test_round_trip(tmp_path):
    example().save(tmp_path / "latency.json")
    assert LatencyTable.load(tmp_path / "latency.json") == example()


def test_cost_of_a_block_is_linear_between_and_beyond_what_was_measured():
    cost = example().decoder.layer_cost(np.array([0, 1, 2, 3, 4, 9]))
    assert cost.tolist() == [0.0, 1.0, 1.5, 1.75, 2.0, 3.25]


class Ticking:
    """An executor on a clock of its own: every layer takes its own time, which grows with the positions."""

    num_layers, base_layers = 3, 0

    def __init__(self):
        self.seconds, self.visited = 0.0, []

    def embed(self, rows, first, tokens):
        self.seconds += 0.25

    def choose(self, exits):
        self.seconds += 2.0

    def project_memory(self, layer, samples):
        self.seconds += 4.0 * layer

    def run_layer(self, layer, pending):
        ((first, last, _),) = pending
        self.seconds += layer * (last - first)
        self.visited.append(layer)


def test_layers_are_measured_in_turn_and_their_mean_is_kept():
    executor = Ticking()
    found = measure_decoder(executor, 2, 5, repeats=4, clock=lambda: executor.seconds)
    assert found.block_sizes == (1, 2, 4)
    assert found.layer_ms == (2000.0, 4000.0, 8000.0)
    assert (found.cross_ms, found.step_ms) == (8000.0, 2250.0)
    assert executor.visited == [1, 2, 3] * (len(executor.visited) // 3)


def test_layers_that_are_never_left_are_measured_apart():
    executor = Ticking()
    executor.base_layers = 1
    found = measure_decoder(executor, 2, 5, repeats=4, clock=lambda: executor.seconds)
    assert (found.base_layers, found.base_ms) == (1, (1000.0, 2000.0, 4000.0))
    assert found.layer_ms == (2500.0, 5000.0, 10_000.0)
    assert found.cross_ms == 10_000.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema": 1, "dec', "latency.json is not JSON"),
        ("", "latency.json is not JSON"),
        ("[]", "latency.json must be a latency table of schema 1"),
        ('{"schema": 7}', "latency.json must be a latency table of schema 1"),
        (ExitPolicy.full_depth().to_json(), "latency.json must be a latency table of schema 1"),
        ('{"schema": 1, "rules": {}}', "latency.json must hold a latency table; an entry is missing or wrong"),
        ('{"schema": 1, "streams": {}, "decoder": {}, "device": ""}', "latency.json must hold a latency table"),
    ],
)
def test_truncated_or_foreign_files_are_refused(tmp_path, text, message):
    (tmp_path / "latency.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        LatencyTable.load(tmp_path / "latency.json")
