"""The table of orders of work: each order runs what its depths ask for, and the costs are those of the calls."""

import pytest
import schedules
from call_cost import CallCost
from decode_case import just_in_time_pairs, ragged_depths
from schedules import ORDERS, full_depth

LAYERS, STEPS = 6, 9


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("name", ORDERS)
def test_an_order_runs_every_pair_that_is_asked_for_once(name, rows):
    depths = ragged_depths(rows, STEPS, LAYERS, 3, seed=rows)
    calls = list(ORDERS[name](depths, LAYERS))
    asked = sum(map(sum, depths)) if name == "nothing caught up" else just_in_time_pairs(depths)
    assert sum(pairs for _, pairs in calls) == asked
    assert all(1 <= n <= min(rows, pairs) for n, pairs in calls)
    assert sum(n for n, _ in calls) == sum(map(sum, depths))  # each token takes the layers up to its own


def test_at_full_depth_all_orders_are_one():
    depths = [[LAYERS] * STEPS] * 4
    assert all(list(order(depths, LAYERS)) == list(full_depth(depths, LAYERS)) for order in ORDERS.values())


def test_rows_that_go_alone_meet_where_most_wait():
    assert list(ORDERS["fullest first"]([[1, 1], [2, 1]], 2)) == [(2, 2), (1, 1), (2, 2)]
    assert list(ORDERS["just in time"]([[1, 2], [2, 2]], 2)) == [(2, 2), (1, 1), (2, 2), (2, 3)]


def test_a_call_costs_what_was_timed_and_between_them_what_lies_between():
    cost = CallCost((1, 4), ((10, 12, 20), (40, 42, 50)))
    assert [cost.of([call]) for call in ((1, 1), (4, 4), (4, 8), (4, 16))] == [10, 40, 42, 50]
    assert cost.of([(2, 2), (4, 12)]) == pytest.approx(20 + 46)
    assert cost.of([(1, 6), (4, 32)]) == pytest.approx(28 + 66)  # beyond: as from 2 to 4 positions


def test_the_page_has_a_line_of_each_batch_and_precision(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    schedules.main(["--shape", "tiny", "--batches", "1", "3", "--repeats", "1", "--out", str(tmp_path)])
    (page,) = (path.read_text() for path in tmp_path.iterdir())
    assert [page.count(f"\n| {batch} | {name} |") for batch in (1, 3) for name in ("ORT fp32", "ORT int8")] == [1] * 4
