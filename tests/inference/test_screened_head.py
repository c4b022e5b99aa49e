"""The screened head against every score computed in float64."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import (
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from lightning_mue.inference import int8_product, screened_head
from lightning_mue.inference.product_graph import product_graph
from lightning_mue.inference.screened_head import Int8Product, ScreenedHead

V, D, R = 1003, 96, 7


def _normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _scores(weight, h, bias=None):
    exact = h.astype(np.float64) @ weight.T.astype(np.float64)
    return exact if bias is None else exact + bias


def _near_duplicates():
    """Each row of states has its best two tokens 1e-5 apart, the better one second; large products cancel."""
    weight, h = _normal(V, D), _normal(R, D, seed=1)
    weight[:, :4] = h[:, :4] = 0
    weight[100 : 100 + R], weight[500 : 500 + R] = h, h * np.float32(1 + 1e-5)
    weight[100 : 100 + R, :2] = weight[500 : 500 + R, 2:4] = 300
    h[:, :4] = 301, -300.9, 301, -300.9
    return weight, h


def _duplicates():
    weight, h = _normal(V, D), _normal(R, D, seed=1)
    weight[300 : 300 + R] = weight[700 : 700 + R] = weight[200 : 200 + R] = 2 * h
    return weight, h


def _outliers(weight_size, state_size):
    weight, h = _normal(V, D), _normal(R, D, seed=1)
    weight[:, 5] *= weight_size
    h[:, 3] *= state_size
    return weight, h


def _aligned(share):
    """States along a token's weights, with noise: a trained head."""
    weight = _normal(V, D) + 0.5 * _normal(1, D, seed=2)
    return weight, weight[np.arange(R) * 50] * np.float32(share) + _normal(R, D, seed=1)


def _norms():
    weight = _normal(V, D) * np.geomspace(1e-12, 1e12, V, dtype=np.float32)[:, None]
    return weight[np.random.default_rng(3).permutation(V)], _normal(R, D, seed=1) * np.float32(1e-3)


def _zero_rows():
    weight = _normal(V, D)
    weight[::3] = 0
    return weight, -np.abs(_normal(R, 1, seed=1)) * weight[1]


CASES = {
    "random": (_normal(V, D), _normal(R, D, seed=1)),
    "many rows": (_normal(V, D), _normal(64, D, seed=1)),
    "odd": (_normal(77, 17), _normal(5, 17, seed=1)),
    "one token": (_normal(1, D), _normal(R, D, seed=1)),
    "one wide": (_normal(V, 1), _normal(R, 1, seed=1)),
    "no rows": (_normal(V, D), _normal(0, D)),
    "wide": (_normal(50, 3000), _normal(R, 3000, seed=1)),
    "trained": _aligned(1.0),
    "barely trained": _aligned(0.2),
    "near duplicates": _near_duplicates(),
    "duplicates": _duplicates(),
    "zero rows": _zero_rows(),
    "all zero": (np.zeros((V, D), np.float32), _normal(R, D)),
    "state zero": (_normal(V, D), np.zeros((R, D), np.float32)),
    "norms": _norms(),
    "outlying state": _outliers(1, 300),
    "outlying weight": _outliers(300, 1),
    "large states": (_normal(V, D), _normal(R, D, seed=1) * np.float32(1e20)),
    "small states": (_normal(V, D), _normal(R, D, seed=1) * np.float32(1e-20)),
}


@pytest.mark.parametrize("bias", [None, "normal", "large", "barred"])
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_exact_arg_max(case, bias):
    weight, h = CASES[case]
    bias_V = {
        None: None,
        "normal": _normal(len(weight), seed=7),
        "large": 1e3 * _normal(len(weight), seed=7),
        "barred": np.where(np.arange(len(weight)) % 2 == 0, np.float32(-np.inf), 0),
    }[bias]
    head = ScreenedHead(weight, bias_V, threads=1)
    expected = _scores(weight, h, bias_V).astype(np.float32).argmax(1).tolist()
    assert [int(head.argmax(row[None])[0]) for row in h] == expected
    found = head.argmax(h)  # the buffers grow, and shrink again
    assert found.dtype == np.int64
    assert found.tolist() == expected
    assert [int(head.argmax(row[None])[0]) for row in h] == expected
    assert head.rows == 3 * len(h)
    assert head.full_rows <= head.refined_rows <= head.rows <= head.candidates


def test_near_duplicates_are_told_apart_and_equals_go_to_the_lowest():
    weight, h = CASES["near duplicates"]
    assert ScreenedHead(weight).argmax(h).tolist() == list(range(500, 500 + R))
    weight, h = CASES["duplicates"]
    assert ScreenedHead(weight).argmax(h).tolist() == list(range(200, 200 + R))
    assert ScreenedHead(*CASES["all zero"][:1]).argmax(h).tolist() == [0] * R


def test_bounds_hold_for_every_score():
    checked = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        width = int(rng.integers(1, 200))
        weight = (rng.standard_t(2, (300, width)) * rng.lognormal(size=(300, 1))).astype(np.float32)
        h = (rng.standard_t(2, (5, width)) * rng.lognormal(size=(5, 1))).astype(np.float32)
        for bounds in _bounds(ScreenedHead(weight, threads=1), h):
            upper = bounds[0].astype(np.float64) * bounds[1][:, None]
            checked += upper.size
            assert (upper >= _scores(weight, h)).all()
    assert checked == 20 * 3 * 5 * 300


def test_bounds_outlast_float32_where_rounding_to_integers_loses_nothing():
    rng = np.random.default_rng(0)
    weight, h = (
        rng.integers(80, 128, (500, 3001)).astype(np.float32),
        rng.integers(80, 128, (4, 3001)).astype(np.float32),
    )
    weight[:, 0] = h[:, 0] = 127
    scores = _scores(weight, h)
    assert (scores.astype(np.float32) < scores).any()
    for upper, unit in _bounds(ScreenedHead(weight, threads=1), h):
        assert (upper.astype(np.float64) * unit[:, None] >= scores).all()
        assert (upper * unit[:, None] <= 1.01 * scores).all()


def _along_the_states_rest(levels):
    """Weights along what rounding the states leaves over; they themselves round without error."""
    weight = np.sign(_normal(1, D))
    weight[:, 0] = 0
    h = np.rint(_normal(1, D, seed=1) * levels / 5) + 0.499 * weight
    h[:, 0] = levels
    return weight.astype(np.float32), h.astype(np.float32)


def _along_the_weights_rest(levels):
    """States along what rounding the weights leaves over; they themselves round without error."""
    h = np.rint(_normal(1, D) * levels / 5)
    h[:, :2] = 0, levels
    weight = np.random.default_rng(1).integers(-100, 101, (10, D)) + 0.499 * h / levels
    weight[:, 0] = 127
    return weight.astype(np.float32), h.astype(np.float32)


@pytest.mark.parametrize("make", [_along_the_states_rest, _along_the_weights_rest])
@pytest.mark.parametrize("levels", [127, 255 * 127 + 127])
def test_bounds_are_reached_where_rounding_errors_conspire(make, levels):
    """Half of a bound would not hold, neither would that of the other row, which is of a single number."""
    weight, h = make(levels)
    scores = _scores(weight, h)
    rounded = np.rint(weight * 127 / np.abs(weight).max()) * np.abs(weight).max() / 127
    error = scores - _scores(rounded, np.rint(h))
    head = ScreenedHead(weight, threads=1)
    upper, unit = (head._coarse if levels == 127 else head._fine)(np.concatenate([h, np.eye(1, D, dtype=np.float32)]))
    bound = upper[:1].astype(np.float64) * unit[0] - (scores - error)
    assert (error > 0).all()
    assert (bound >= error).all()
    assert (0.5 * bound < error).all()


def test_screens_get_sharper():
    weight, h = CASES["outlying state"]
    slack = [
        (upper * unit[:, None] - _scores(weight, h)).mean()
        for upper, unit in _bounds(ScreenedHead(weight, threads=1), h)
    ]
    assert slack[0] > 3 * slack[1] > 30 * slack[2] > 0


def _bounds(head, h):
    return [(screen(h)[0].copy(), screen(h)[1]) for screen in (head._coarse, head._fine, head._full)]


def test_rows_that_stay_open_are_counted():
    weight = _normal(V, D)
    head = ScreenedHead(weight, threads=1)
    head.argmax(weight[:4])
    assert (head.rows, head.refined_rows, head.full_rows, head.candidates) == (4, 0, 0, 4)
    head.argmax(np.concatenate([weight[4:6], np.zeros((1, D), np.float32)]))
    assert (head.rows, head.refined_rows, head.full_rows) == (7, 1, 1)
    assert head.candidates == 4 + 3 + 1 + 1 + V  # the best of each screen, and for the row of zeros every token
    spiked = _normal(1, D, seed=1)
    spiked[0, 0] = 60.0
    flat = weight.copy()
    flat[:, 0] = 0  # the spike costs the other states their bits and decides nothing
    head = ScreenedHead(flat, threads=1)
    assert head.argmax(spiked)[0] == _scores(flat, spiked).argmax()
    assert (head.rows, head.refined_rows, head.full_rows) == (1, 1, 0)


PROCESSORS = {
    "n-gram": NoRepeatNGramLogitsProcessor(2),
    "penalty": RepetitionPenaltyLogitsProcessor(20.0),
    "prefix": PrefixConstrainedLogitsProcessor(lambda row, ids: [3 * row + 1, 3 * row + 2, 900], 1),
    "forced": PrefixConstrainedLogitsProcessor(lambda row, ids: [40 + row], 1),
}


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("case", ["random", "trained", "near duplicates", "outlying state", "state zero"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_processed_scores_are_those_of_the_full_head(name, case, has_bias):
    weight, h = CASES[case]
    bias = _normal(V, seed=7) if has_bias else None
    full = torch.from_numpy(_scores(weight, h, bias).astype(np.float32))
    best = full.argmax(1)
    # The best token follows itself in each row's past, so that the n-gram bars it and the penalty lowers it.
    ids = torch.stack([best, best, full.argmin(1), best], 1)
    processor = PROCESSORS[name]

    def process(rows, scores):
        if name in ("prefix", "forced"):  # transformers counts the rows of what it is given
            seen = torch.full((R, scores.shape[1]), 0.0)
            seen[torch.from_numpy(rows)] = torch.from_numpy(scores)
            return processor(ids, seen).numpy()[rows]
        return processor(ids[torch.from_numpy(rows)], torch.from_numpy(scores)).numpy()

    expected = processor(ids, full.clone()).argmax(1)
    changes_nothing = name == "penalty" and case == "state zero" and not has_bias
    assert torch.equal(expected, best) == changes_nothing
    head = ScreenedHead(weight, bias, threads=1)
    assert head.argmax(h, process).tolist() == expected.tolist()
    assert case != "trained" or head.full_rows == 0


def test_rows_are_named_to_processors_whatever_screen_they_reach():
    weight = _normal(V, D)
    h = np.concatenate([np.zeros((1, D), np.float32), weight[40:42], np.zeros((1, D), np.float32)])

    def process(rows, scores):
        scores[np.arange(scores.shape[1]) < 10 + rows[:, None]] = -np.inf
        return scores

    assert ScreenedHead(weight, threads=1).argmax(h, process).tolist() == [10, 40, 41, 13]
    assert ScreenedHead(weight).argmax(h, lambda rows, scores: np.full_like(scores, -np.inf)).tolist() == [0] * 4


class _Saturating(Int8Product):
    """What x86 without VNNI computes: the sum of two products is cut to 16 bits."""

    def __init__(self, weight_VD, scale_V, norms_2V, threads, graph):
        self.weight_VD, self.scale_V, self.norms_2V = weight_VD.astype(np.int64), scale_V, norms_2V

    def __call__(self, p_RD, sizes_2):
        products = (p_RD.astype(np.int64) + 128)[:, None] * self.weight_VD
        products = np.pad(products, [(0, 0), (0, 0), (0, products.shape[2] % 2)])
        sums = (products[..., ::2] + products[..., 1::2]).clip(-(2**15), 2**15 - 1).sum(2) - 128 * self.weight_VD.sum(1)
        return (sums * self.scale_V + sizes_2 @ self.norms_2V).astype(np.float32)


@pytest.mark.parametrize("width", [96, 17])
def test_saturating_products_get_smaller_weights(monkeypatch, width):
    weight = _normal(300, width)
    weight[0] = 3.0  # all at the largest integer
    h = np.concatenate([np.ones((1, width), np.float32), _normal(5, width, seed=1)])
    for module in (screened_head, int8_product):
        monkeypatch.setattr(module, "Int8Product", _Saturating)
    head = ScreenedHead(weight, threads=1)
    assert np.abs(head._product.weight_VD).max() == 63
    assert head.argmax(h).tolist() == _scores(weight, h).argmax(1).tolist()
    assert head.full_rows == 0
    monkeypatch.setattr(int8_product, "WEIGHT_LEVELS", (127,))  # and where nothing helps, no int8 at all
    head = ScreenedHead(weight, threads=1)
    assert head.argmax(h).tolist() == _scores(weight, h).argmax(1).tolist()
    assert (head.rows, head.refined_rows, head.full_rows) == (6, 0, 6)


def test_what_is_refused():
    weight, h = CASES["random"]
    nan = weight.copy()
    nan[3, 4] = np.nan
    for wrong in (nan, weight * np.float32(1e30), weight.astype(np.float64), weight[0], weight[:0]):
        with pytest.raises(ValueError, match="Weights must be"):
            ScreenedHead(wrong)
    for wrong in (np.full(V, np.nan, np.float32), np.full(V, np.inf, np.float32), np.zeros(V - 1, np.float32)):
        with pytest.raises(ValueError, match="`bias_V` must be float32"):
            ScreenedHead(weight, wrong)
    head = ScreenedHead(weight)
    for wrong in (h[0], h[:, 1:], h.astype(np.float64)):
        with pytest.raises(ValueError, match=r"States must be float32 \[R, 96\], got"):
            head.argmax(wrong)
    with pytest.raises(ValueError, match="States must be finite"):
        head.argmax(np.full_like(h, np.inf))
    with pytest.raises(ValueError, match="`process` must change each score by itself"):
        head.argmax(h, lambda rows, scores: -scores)


def test_torch_is_not_needed():
    path = screened_head.__file__
    code = f"import runpy, sys; runpy.run_path({path!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_machine_is_asked_how_large_weights_may_be(monkeypatch):
    graph = product_graph(*int8_product.PROBE)
    assert int8_product.largest_weight(graph, *int8_product.PROBE) in int8_product.WEIGHT_LEVELS
    monkeypatch.setattr(int8_product, "Int8Product", _Saturating)
    assert int8_product.largest_weight(graph, *int8_product.PROBE) == 63
    monkeypatch.setattr(int8_product, "WEIGHT_LEVELS", (127,))
    assert int8_product.largest_weight(graph, *int8_product.PROBE) is None
