"""What the cost model adds up is what the schedule asks of an executor: every call, pair and projection once."""

import time

import pytest
from call_cost import CallCost, StepCost
from decode import read_shape
from decode_case import START, Case, just_in_time_pairs, ragged_depths
from decode_lines import LINES, SCHEDULES
from decode_predicted import Priced, Prices, predictions

from lightning_mue.inference.schedule import DecoderExits, decode

LAYERS, STEPS, ROWS = 6, 9, 4
FREE = CallCost((1, ROWS), ((0, 0, 0), (0, 0, 0)))
A_CALL = CallCost((1, ROWS), ((1, 1, 1), (1, 1, 1)))
A_PAIR = CallCost((1, ROWS), ((1, 2, 4), (ROWS, 2 * ROWS, 4 * ROWS)))
DEPTHS = ragged_depths(ROWS, STEPS, LAYERS, 3, seed=1)


def cost(depths, prices):
    priced = Priced(LAYERS, prices)
    exits = DecoderExits("static", lambda _step: {}, forced=depths)
    decode(priced, exits, [[START]] * len(depths), (), STEPS)
    return priced.ms


def test_each_pair_is_paid_for_once():
    for together in (True, False):
        assert cost(DEPTHS, Prices(StepCost(A_PAIR, 0), together, 0)) == pytest.approx(just_in_time_pairs(DEPTHS))


def test_a_layer_is_called_while_a_row_is_there():
    deepest = [max(of_step) for of_step in zip(*DEPTHS, strict=True)]
    assert cost(DEPTHS, Prices(StepCost(A_CALL, 0), True, 0)) == sum(deepest)
    assert cost(DEPTHS, Prices(StepCost(A_CALL, 0), False, 0)) > sum(deepest)  # rows that miss other positions


def test_memory_is_projected_where_a_row_comes_first_and_each_step_has_a_head():
    assert cost(DEPTHS, Prices(StepCost(FREE, 0), True, 1)) == sum(map(max, DEPTHS))
    assert cost(DEPTHS, Prices(StepCost(FREE, 1), True, 0)) == STEPS


@pytest.mark.parametrize("rows", [1, 3])
def test_every_line_of_ours_is_predicted(rows):
    pytest.importorskip("onnxruntime")
    found = predictions(Case(read_shape("tiny"), rows, time.process_time, 2), LINES)
    ours = {name for name, line in LINES.items() if line.executor_of is not None}
    assert found.keys() == ours
    assert len(ours) % len(SCHEDULES) == 0
    assert all(ms > 0 for ms in found.values())
