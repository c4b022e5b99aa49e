"""The limits: counted work against hand arithmetic and a library's counter; times of a made-up machine."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lightning_mue.backbones import view
from lightning_mue.benchmark.limits import (
    BYTES,
    DecoderWork,
    Machine,
    StreamWork,
    Work,
    answer_runs,
    decoder_runs,
    layer_calls,
    least_seconds,
    macs,
    stream_runs,
)
from lightning_mue.benchmark.machine import hardware, measure_machine, versions
from lightning_mue.benchmark.work import model_work
from lightning_mue.inference import ExitEngine
from lightning_mue.policy import PRECISIONS, ExitPolicy, ExitRule
from tests import zoo
from tests.invariants.policies import STEPS

WIDTH, FFN, MEMORY = 32, 48, 11
LAYER = 6 * WIDTH**2 + 2 * WIDTH * FFN  # self-attention, query and output of cross-attention, the two of the FFN
BIASES = 6 * WIDTH + FFN + WIDTH


def test_cocas_decoder_is_counted_as_by_hand():
    """Blocks of 4 matrices and an MLP 4 times as wide; above the unimodal half one more with cross-attention."""
    work = model_work(zoo.shared("coca"), zoo.inputs("coca", 2)).decoder
    block, memory = 12 * WIDTH**2, zoo.shared("coca").coca.visual.attn_pool.query.shape[0] - 1
    biases = (3 + 1 + 4 + 1) * WIDTH
    for layer, projection in zip(work.layers[:2], work.memory[:2], strict=True):
        assert layer == Work(block + biases, block + 2 * WIDTH)
        assert projection == Work(0, 0)
    for layer, projection in zip(work.layers[2:], work.memory[2:], strict=True):
        weights = 2 * block - 2 * WIDTH**2
        assert layer == Work(weights + 2 * biases - 2 * WIDTH, weights + 2 * WIDTH * (1 + memory), 2 * memory * WIDTH)
        assert projection == Work(2 * WIDTH**2 + 2 * WIDTH, 2 * WIDTH**2 * memory)
    assert work.head == Work(zoo.VOCABULARY * WIDTH, zoo.VOCABULARY * WIDTH)


@pytest.mark.parametrize("name", [name for name in zoo.BACKBONES if name.startswith("florence2")])
def test_a_decoder_is_counted_as_by_hand(name):
    work = model_work(zoo.shared(name), zoo.inputs(name, 2)).decoder
    assert len(work.layers) == len(work.memory) == 5
    for layer, memory in zip(work.layers, work.memory, strict=True):
        attention = 2 * WIDTH * 1 + 2 * WIDTH * MEMORY
        assert (layer.weights, layer.macs) == (LAYER + BIASES, LAYER + attention)
        assert layer.cached == 2 * MEMORY * WIDTH
        assert (memory.weights, memory.macs) == (2 * WIDTH**2 + 2 * WIDTH, 2 * WIDTH**2 * MEMORY)
    assert work.head == Work(zoo.VOCABULARY * WIDTH, zoo.VOCABULARY * WIDTH)


@torch.no_grad()
@pytest.mark.parametrize("name", zoo.BACKBONES)
@pytest.mark.parametrize("depth", [4, None])
def test_streams_and_whole_answers_are_what_a_counter_counts(name, depth):
    """Of a run of the engine; beside that it attends to the tokens before, and adapts states that leave: by hand."""
    model, given = zoo.shared(name), zoo.inputs(name, 3)
    names = [stream.name for stream in view(model).encoders]
    rules = {} if depth is None else {"decoder": ExitRule.static(depth)}
    engine = ExitEngine(model, ExitPolicy(rules))
    torch.backends.mha.set_fastpath_enabled(False)  # which no counter sees into
    try:
        with FlopCounterMode(display=False) as counter:
            out = engine.generate(STEPS, **given)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    work, lengths = model_work(model, given), (out.exit_depths["decoder"] > 0).sum(1).tolist()
    decoder = view(model).decoder
    last, inside = decoder.num_layers, decoder.num_heads * decoder.head_dim
    depths = [[depth or last] * length for length in lengths]
    runs = answer_runs(
        work.streams, work.decoder, {stream: out.exit_depths[stream].tolist() for stream in names}, depths
    )
    before = sum((depth or last) * 2 * inside * t for length in lengths for t in range(length))
    adapters = 0 if depth is None else sum(lengths) * 2 * WIDTH * 8
    assert macs(runs) + before + adapters == counter.get_total_flops() / 2


def test_a_stream_runs_a_layer_for_the_rows_that_are_there():
    stream = StreamWork(Work(7, 70), [Work(10, 400), Work(11, 404), Work(12, 408)])
    assert stream_runs(stream, [1, 3, 1, 2]) == [Work(7, 70), Work(10, 400), Work(11, 202), Work(12, 102)]


def test_runs_of_a_decoder_by_hand():
    """Two rows: one token at 2 then at 1 and 2, the other ends after its first token at 1."""
    decoder = DecoderWork([Work(10, 3, 5), Work(20, 4, 6)], [Work(1, 30), Work(2, 31)], Work(9, 90))
    runs = decoder_runs(decoder, [[2, 1, 2], [1]])
    assert runs == {
        "layers": [Work(10, 6, 10), Work(20, 4, 6), Work(10, 3, 5), Work(10, 3, 5), Work(20, 8, 6)],
        "memory": [Work(1, 60), Work(2, 31)],
        "head": [Work(9, 180), Work(9, 90), Work(9, 90)],
    }
    assert macs(runs) == 6 + 4 + 3 + 3 + 8 + 91 + 360


@pytest.mark.parametrize("prompts", [None, [3, 0, 2]])
def test_layer_calls_run_each_position_once_and_no_more_than_is_asked(prompts):
    rng = np.random.default_rng(0)
    depths = [rng.integers(1, 7, length).tolist() for length in (9, 4, 12)]
    done = set()
    expected = []
    for t in range(12):
        for layer in range(1, 7):
            rows = [r for r, of_row in enumerate(depths) if t < len(of_row) and of_row[t] >= layer]
            last = {r: t + (prompts[r] if prompts else 0) for r in rows}
            missing = {(r, p, layer) for r in rows for p in range(last[r] + 1)} - done
            done |= missing
            if rows:
                expected.append((layer, len(rows), len(missing)))
    assert list(layer_calls(depths, prompts)) == expected


def test_reading_or_multiplying_takes_longer():
    machine, head = Machine("bfloat16", bytes_per_s=100, macs_per_s=50), Machine("int8", 10, 1000)
    assert machine.seconds(Work(30, 100, cached=20)) == pytest.approx(2.0)  # 100 / 50 against 2 * 50 / 100
    assert machine.seconds(Work(300, 100, cached=20)) == pytest.approx(6.4)
    assert Machine("float32", 100, 50).seconds(Work(30, 0, cached=20)) == pytest.approx(2.0)
    assert Machine("int8", 100, 50).seconds(Work(30, 0, cached=20)) == pytest.approx(0.7)
    runs = {"layers": [Work(300, 0), Work(50, 100)], "memory": [], "head": [Work(50, 1)]}
    assert least_seconds(runs, machine, head) == pytest.approx({"layers": 6 + 2, "memory": 0, "head": 5})


def test_every_precision_has_its_bytes():
    assert set(BYTES) == {precision or "float32" for precision in PRECISIONS}


class Clock:
    """A second passes whenever it is asked."""

    now = 0.0

    def __call__(self):
        self.now += 1.0
        return self.now


def test_a_machine_is_what_it_read_and_multiplied_in_the_time():
    found = measure_machine("float32", 3 << 18, clock=Clock())
    buffer, times = 3 << 20, -(-(1 << 27) // (3 << 20))
    assert found == Machine("float32", pytest.approx(buffer * times), 1024.0**3)
    tiny = measure_machine("int8", 1, clock=Clock())
    assert tiny == Machine("int8", pytest.approx(float(1 << 27)), 1024.0**3), "a mebibyte at least"


def test_the_page_says_where():
    assert "cores" in hardware(torch.device("cpu"))
    assert {"torch", "transformers"} <= set(versions())
