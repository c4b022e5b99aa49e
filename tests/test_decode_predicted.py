"""What the cost model adds up is what the schedule asks of an executor: every call, pair and projection once."""

import time

import pytest
from call_cost import CallCost
from decode import read_shape
from decode_case import START, Case, just_in_time_pairs, ragged_depths
from decode_lines import LINES, SCHEDULES
from decode_predicted import Priced, Prices, predictions

from lightning_mue.inference.schedule import DecoderExits, decode

LAYERS, STEPS, ROWS = 6, 9, 4
FREE = CallCost(0, 0, 0)
DEPTHS = ragged_depths(ROWS, STEPS, LAYERS, 3, seed=1)


def cost(depths, prices):
    priced = Priced(LAYERS, prices)
    exits = DecoderExits("static", lambda _step: {}, forced=depths)
    decode(priced, exits, [[START]] * len(depths), (), STEPS)
    return priced.ms


def test_each_pair_is_paid_for_once():
    for together in (True, False):
        assert cost(DEPTHS, Prices(CallCost(0, 1, 1), together, 0, 0)) == just_in_time_pairs(DEPTHS)


def test_a_layer_is_called_while_a_row_is_there():
    deepest = [max(of_step) for of_step in zip(*DEPTHS, strict=True)]
    assert cost(DEPTHS, Prices(CallCost(1, 0, 0), True, 0, 0)) == sum(deepest)
    assert cost(DEPTHS, Prices(CallCost(1, 0, 0), False, 0, 0)) > sum(deepest)  # rows that miss other positions


def test_memory_is_projected_where_a_row_comes_first_and_each_step_has_a_head():
    assert cost(DEPTHS, Prices(FREE, True, 0, 1)) == sum(map(max, DEPTHS))
    assert cost(DEPTHS, Prices(FREE, True, 1, 0)) == STEPS


def test_rows_between_which_others_are_left_out_cost_more():
    depths = [[2] * STEPS, [1] * STEPS, [2] * STEPS, [1] * STEPS]
    assert cost(depths, Prices(CallCost(0, 0, 0, apart=1), True, 0, 0)) == 2 * STEPS  # rows 0 and 2, in layer 2
    depths = [[2] * STEPS, [2] * STEPS, [1] * STEPS, [1] * STEPS]
    assert cost(depths, Prices(CallCost(0, 0, 0, apart=1), True, 0, 0)) == 0


@pytest.mark.parametrize("rows", [1, 3])
def test_every_line_of_ours_is_predicted(rows):
    pytest.importorskip("onnxruntime")
    found = predictions(Case(read_shape("tiny"), rows, time.process_time, 2), LINES)
    ours = {name for name, line in LINES.items() if line.executor_of is not None}
    assert found.keys() == ours
    assert len(ours) % len(SCHEDULES) == 0
    assert all(ms > 0 for ms in found.values())
