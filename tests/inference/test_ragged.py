"""Ragged attention against float64 sums pair by pair; compiled, and through numpy."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from lightning_mue.inference import ragged
from lightning_mue.inference.bfloat16 import from_bfloat16, to_bfloat16
from lightning_mue.inference.pairs import attend_both
from lightning_mue.inference.ragged import attend

MASKED = np.finfo(np.float32).min
ROUNDED = [0x3F80, 0x3F80, 0x3F82, 0xFF80, 0x7FC0]
needs_numba = pytest.mark.skipif(not ragged.COMPILED, reason="numba is not installed")


compiled_alone = pytest.mark.parametrize("form", [pytest.param("numba", marks=needs_numba)], indirect=True)


@pytest.fixture(params=[pytest.param("numba", marks=needs_numba), "numpy"], autouse=True)
def form(request, monkeypatch):
    monkeypatch.setattr(ragged, "COMPILED", request.param == "numba")


def case(batch, heads, positions, d, pairs, seed=0):
    rng = np.random.default_rng(seed)
    keys, values = rng.standard_normal((2, batch, heads, positions, d), dtype=np.float32)
    queries = rng.standard_normal((pairs, heads, d), dtype=np.float32) / np.float32(d**0.5)
    return queries, keys, values


def reference(queries, keys, values, rows, lengths, bias=None, back=None):
    found = np.empty(queries.shape)
    for n, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        for head in range(queries.shape[1]):
            scores = keys[row, head, :length].astype(np.float64) @ queries[n, head].astype(np.float64)
            if bias is not None:
                scores = scores + bias[row, :length]
            if back is not None:
                scores = scores + [back[head, length - 1 - t] for t in range(length)]
            weights = np.exp(scores - scores.max())
            found[n, head] = weights @ values[row, head, :length].astype(np.float64) / weights.sum()
    return found


def off(found, expected):
    return np.abs(found - expected).max()


@pytest.mark.parametrize("d", [1, 7, 16, 40, 64, 80, 96, 128])
@pytest.mark.parametrize(
    ("rows", "lengths"),
    [
        ([0], [1]),
        ([2], [37]),
        ([2, 0, 1], [37, 37, 37]),
        ([1, 0, 1, 2, 0], [3, 8, 37, 1, 5]),
        ([1, 1, 1, 0, 0, 2], [4, 5, 6, 37, 37, 2]),
        ([0] * 19 + [2] * 9, [37] * 19 + [36] * 9),
    ],
)
def test_it_is_attention(rows, lengths, d):
    queries, keys, values = case(3, 2, 37, d, len(rows))
    found = attend(queries, keys, values, np.array(rows), np.array(lengths))
    assert found.dtype == np.float32
    assert off(found, reference(queries, keys, values, rows, lengths)) <= 2e-6


def test_over_the_tokens_of_a_picture():
    rows, lengths = np.repeat(np.arange(4), 3), np.full(12, 597)
    queries, keys, values = case(4, 12, 597, 64, 12)
    assert off(attend(queries, keys, values, rows, lengths), reference(queries, keys, values, rows, lengths)) <= 2e-6


@pytest.mark.parametrize("d", [24, 64])
def test_bfloat16_is_widened_and_summed_in_float32(d):
    rows, lengths = [1, 1, 0, 2], [21, 21, 4, 9]
    queries, *kv = case(3, 2, 21, d, 4)
    rounded = [torch.from_numpy(x).bfloat16() for x in kv]
    bits = [x.view(torch.int16).numpy().view(np.uint16) for x in rounded]
    expected = reference(queries, *(x.double().numpy() for x in rounded), rows, lengths)
    assert off(attend(queries, *bits, rows, lengths), expected) <= 2e-6


@pytest.mark.parametrize("masked", [MASKED, -np.inf, -1e30])
def test_what_the_bias_masks_has_no_weight_at_all(masked):
    rows, lengths = [2, 0, 0, 1], [30, 30, 30, 11]
    queries, keys, values = case(3, 2, 30, 16, 4)
    bias = np.random.default_rng(1).standard_normal((3, 30)).astype(np.float32)
    bias[:, ::3] = masked
    expected = reference(queries, keys, values, rows, lengths, bias)
    assert off(attend(queries, keys, values, rows, lengths, bias), expected) <= 2e-6
    values[:, :, ::3] = 1e30
    assert off(attend(queries, keys, values, rows, lengths, bias), expected) <= 2e-6


@pytest.mark.parametrize("d", [16, 64])
def test_a_bias_of_how_far_back_a_position_is(d):
    """Of each head; beside one of each row, and among pairs of one row that see more and less."""
    rows, lengths = [2, 0, 0, 1, 1], [30, 29, 30, 11, 1]
    queries, keys, values = case(3, 2, 30, d, 5)
    bias, back = (np.random.default_rng(1).standard_normal((n, 30)).astype(np.float32) * 3 for n in (3, 2))
    for of_row in (None, bias):
        expected = reference(queries, keys, values, rows, lengths, of_row, back)
        assert off(attend(queries, keys, values, rows, lengths, of_row, back_HT=back), expected) <= 5e-6


def test_the_largest_score_is_taken_off():
    queries, keys, values = case(1, 2, 13, 32, 1)
    bias = np.full((1, 13), 3e4, np.float32)
    shifted = (bias[0] + np.einsum("htd,hd->ht", keys[0], queries[0])).astype(np.float32)
    weights = np.exp(np.float64(shifted) - shifted.max(-1, keepdims=True))
    expected = np.einsum("ht,htd->hd", weights / weights.sum(-1, keepdims=True), values[0])
    assert off(attend(queries, keys, values, [0], [13], bias), expected) <= 5e-3  # float32 near 3e4 has steps of 2e-3


def test_weights_are_exponentials_to_the_last_bits():
    scores = np.linspace(-63.9, 0, 4001, dtype=np.float32)
    keys, values = np.zeros((2, 1, scores.size, 2, 1), np.float32)
    keys[0, :, 1, 0], values[0, :, 1] = scores, 1
    found = attend(np.ones((1, scores.size, 1), np.float32), keys, values, [0], [2])[0, :, 0]
    expected = 1 / (1 + np.exp(-scores.astype(np.float64)))
    assert np.abs(found / expected - 1).max() < 1e-6


def test_positions_past_the_length_are_not_read():
    rows, lengths = [0, 0, 0, 1], [5, 6, 9, 8]
    queries, keys, values = case(2, 2, 12, 16, 4)
    expected = reference(queries, keys, values, rows, lengths)
    for x in (keys, values):
        x[0, :, 9:], x[1, :, 8:] = np.nan, np.inf
    assert off(attend(queries, keys, values, rows, lengths), expected) <= 2e-6


def test_nan_stays_with_its_pair():
    rows, lengths = [0, 0, 0, 1], [12, 12, 12, 12]
    queries, keys, values = case(2, 2, 12, 16, 4)
    expected = attend(queries, keys, values, rows, lengths)
    queries[1, 0, 3], keys[1, 1, 5, 2] = np.nan, np.nan
    found = attend(queries, keys, values, rows, lengths)
    broken = np.zeros((4, 2), bool)
    broken[1, 0] = broken[3, 1] = True
    assert np.isnan(found[broken]).all()
    assert off(found[~broken], expected[~broken]) <= 1e-6


@compiled_alone
@pytest.mark.parametrize("kv", ["float32", "bfloat16"])
@pytest.mark.parametrize("d", [20, 64])
def test_a_pair_does_not_depend_on_the_others(d, kv):
    rows, lengths = np.array([0] * 11 + [1, 1, 2, 0]), np.array([41] * 11 + [41, 40, 7, 41])
    queries, *caches = case(3, 2, 41, d, 15)
    caches = [to_bfloat16(x) if kv == "bfloat16" else x for x in caches]
    together = attend(queries, *caches, rows, lengths)
    alone = [attend(queries[[n]], *caches, rows[[n]], lengths[[n]])[0] for n in range(15)]
    assert np.array_equal(together, np.stack(alone))
    order = np.random.default_rng(2).permutation(15)
    assert np.array_equal(together[order], attend(queries[order], *caches, rows[order], lengths[order]))


@pytest.mark.parametrize("threads", [2, 3, 9])
def test_threads_change_no_bit(threads, monkeypatch):
    monkeypatch.setattr(ragged, "_FEW", 0)
    rows, lengths = np.array([0, 0, 1, 2, 2, 2]), np.array([9, 9, 30, 30, 30, 2])
    queries, keys, values = case(3, 5, 30, 64, 6)
    bias = np.random.default_rng(1).standard_normal((3, 30)).astype(np.float32)
    found = attend(queries, keys, values, rows, lengths, bias, threads=threads)
    assert np.array_equal(found, attend(queries, keys, values, rows, lengths, bias))
    with pytest.raises(ValueError, match="rows must be"):
        attend(queries, keys, values, rows + 1, lengths, bias, threads=threads)


def test_out_is_written_and_may_be_the_queries():
    rows, lengths = [1, 0, 0], [6, 6, 6]
    queries, keys, values = case(2, 3, 6, 16, 3)
    expected = reference(queries, keys, values, rows, lengths)
    out = np.full_like(queries, np.nan)
    assert attend(queries, keys, values, rows, lengths, out_NHd=out) is out
    assert off(out, expected) <= 2e-6
    assert off(attend(queries, keys, values, rows, lengths, None, queries), expected) <= 2e-6
    assert off(queries, expected) <= 2e-6


def test_queries_may_be_part_of_a_larger_array():
    rows, lengths = [1, 0, 0], [6, 6, 6]
    queries, keys, values = case(2, 3, 6, 16, 3)
    beside = np.concatenate([queries, queries], axis=-1)
    found = attend(beside[:, :, 16:], keys, values, rows, lengths)
    assert off(found, reference(queries, keys, values, rows, lengths)) <= 2e-6


@pytest.mark.parametrize("threads", [1, 2])
def test_no_pairs(threads):
    queries, keys, values = case(2, 3, 6, 16, 0)
    assert attend(queries, keys, values, [], [], threads=threads).shape == (0, 3, 16)


WRONG = {
    "double queries": ({"q_NHd": np.zeros((2, 3, 8))}, TypeError, "must be float32"),
    "half keys": ({"keys_BHTd": np.zeros((2, 3, 6, 8), np.float16)}, TypeError, "got float32, float16, float32"),
    "keys and values differ": ({"values_BHTd": np.zeros((2, 3, 6, 8), np.uint16)}, TypeError, "uint16"),
    "double bias": ({"bias_BT": np.zeros((2, 6))}, TypeError, "must be float32"),
    "double out": ({"out_NHd": np.zeros((2, 3, 8))}, TypeError, "must be float32"),
    "three axes": ({"keys_BHTd": np.zeros((2, 3, 8), np.float32)}, ValueError, r"keys and values \[B, H, T, d\]"),
    "other head size": ({"q_NHd": np.zeros((2, 3, 9), np.float32)}, ValueError, r"got \(2, 3, 9\)"),
    "other heads": ({"values_BHTd": np.zeros((2, 4, 6, 8), np.float32)}, ValueError, r"\(2, 4, 6, 8\)"),
    "a row more": ({"rows_N": [0, 1, 1]}, ValueError, r"\(3,\) and \(2,\)"),
    "a length less": ({"lengths_N": [6]}, ValueError, r"\(2,\) and \(1,\)"),
    "bias of other length": ({"bias_BT": np.zeros((2, 5), np.float32)}, ValueError, r"\(2, 5\)"),
    "distances of other length": ({"back_HT": np.zeros((3, 5), np.float32)}, ValueError, r"\(3, 5\)"),
    "double distances": ({"back_HT": np.zeros((3, 6))}, TypeError, "must be float32"),
    "out of other shape": ({"out_NHd": np.zeros((1, 3, 8), np.float32)}, ValueError, r"\(1, 3, 8\)"),
    "sums of other shape": ({"logsum_NH": np.zeros((2, 2), np.float32)}, ValueError, r"\(2, 2\)"),
    "double sums": ({"logsum_NH": np.zeros((2, 3))}, TypeError, "must be float32"),
    "a view of keys": ({"keys_BHTd": np.zeros((2, 3, 9, 8), np.float32)[:, :, :6]}, ValueError, "must be contiguous"),
    "row too large": ({"rows_N": [0, 2]}, ValueError, r"rows must be 0 \.\. 1, .*; pair 1 has 2 and 6"),
    "negative row": ({"rows_N": [-1, 0]}, ValueError, "pair 0 has -1 and 6"),
    "length too large": ({"lengths_N": [6, 7]}, ValueError, r"lengths 1 \.\. 6; pair 1 has 1 and 7"),
    "no length": ({"lengths_N": [0, 6]}, ValueError, "pair 0 has 0 and 0"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_refused(what):
    changed, error, message = WRONG[what]
    queries, keys, values = case(2, 3, 6, 8, 2)
    fitting = {"q_NHd": queries, "keys_BHTd": keys, "values_BHTd": values, "rows_N": [0, 1], "lengths_N": [6, 6]}
    attend(**fitting)
    with pytest.raises(error, match=message):
        attend(**(fitting | changed))


def test_bfloat16_rounds_as_torch_does():
    rng = np.random.default_rng(0)
    any_bits = rng.integers(0, 1 << 32, 200_000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    ties = (rng.integers(0, 1 << 16, 10_000, dtype=np.uint32) << 16 | 0x8000).view(np.float32)
    edges = np.array([0, -0.0, np.inf, -np.inf, np.finfo(np.float32).max, MASKED, 1e-45, 1e-40], np.float32)
    x = np.concatenate([any_bits, ties, edges, np.array([0x7F800001, 0xFFFFFFFF], np.uint32).view(np.float32)])
    bits, number = to_bfloat16(x), ~np.isnan(x)
    expected = torch.from_numpy(x).bfloat16()
    assert bits.dtype == np.uint16
    assert np.array_equal(bits[number], expected.view(torch.int16).numpy().view(np.uint16)[number])
    assert np.isnan(from_bfloat16(bits)).tolist() == (~number).tolist()
    assert np.array_equal(from_bfloat16(bits)[number], expected.float().numpy()[number])
    assert to_bfloat16(x[:6].reshape(1, 2, 3)[:, :, ::2]).shape == (1, 2, 2)
    place = np.zeros((2, len(x)), np.uint16)
    assert to_bfloat16(x, out=place[1]) is not None
    assert np.array_equal(place[1], bits)
    assert not place[0].any()


def run_alone(code, hidden=(), **environment):
    """Run code after the file itself, not the package, was loaded as ``ragged`` without these modules."""
    load = f"""
import importlib.util, sys
import numpy as np
sys.modules |= dict.fromkeys({hidden})
spec = importlib.util.spec_from_file_location("ragged", {ragged.__file__!r})
sys.modules["ragged"] = ragged = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ragged)
assert "torch" not in sys.modules
"""
    command, environment = [sys.executable, "-c", load + code], os.environ | environment
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=300).stdout


@compiled_alone
def test_without_numba():
    code = """
assert not ragged.COMPILED
ones = np.ones((1, 1, 4), np.float32)
print(ragged.attend(ones, ones[None], ones[None], [0], [1], threads=2).tolist())
x, place = np.array([1, 1 + 2**-8, 1 + 3 * 2**-8, -np.inf, np.nan], np.float32), np.empty(5, np.uint16)
from lightning_mue.inference.bfloat16 import to_bfloat16
print(to_bfloat16(x).tolist())
to_bfloat16(x, out=place)
print(place.tolist())
"""
    assert run_alone(code, hidden=["numba"]).splitlines() == ["[[[1.0, 1.0, 1.0, 1.0]]]", str(ROUNDED), str(ROUNDED)]


@compiled_alone
def test_what_is_compiled_and_what_lay_compiled_give_the_same_bits(tmp_path):
    code = """
rng = np.random.default_rng(0)
keys, values = rng.standard_normal((2, 2, 3, 97, 64), dtype=np.float32)
print(ragged.attend(keys[0, :, :3] / 8, keys, values, [1, 0, 0], [97, 97, 50]).tobytes().hex())
"""
    first, second = (run_alone(code, NUMBA_CACHE_DIR=str(tmp_path)) for _ in range(2))
    assert len(first) > 3 * 3 * 64 * 4 * 2
    assert first == second


@pytest.mark.parametrize("threads", [1, 2])
def test_two_sets_of_keys_are_read_in_one_softmax(threads):
    """Also where one set is almost all of it, and where padding and a window hide parts."""
    rows, lengths, of_memory = np.array([0, 2, 2, 1]), np.array([5, 9, 9, 1]), np.full(4, 13)
    queries, keys, values = case(3, 2, 9, 16, 4)
    _, more_keys, more_values = case(3, 2, 13, 16, 4, seed=1)
    bias, back = np.zeros((3, 13), np.float32), np.zeros((2, 9), np.float32)
    bias[2, 7:], back[:, 4:] = MASKED, MASKED
    for scale in (1, 30):
        more = np.ascontiguousarray(more_keys * np.float32(scale))
        own, memory = (keys, values, rows, lengths, None), (more, more_values, rows, of_memory, bias)
        found = attend_both(queries, own, memory, threads, back)
        for n, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            both = (
                np.concatenate([a[row, :, :length], b[row]], 1)[None] for a, b in ((keys, more), (values, more_values))
            )
            hidden = np.concatenate([back[0, length - 1 :: -1], bias[row]])[None]
            expected = reference(queries[[n]], *both, [0], [length + 13], hidden)
            assert off(found[n], expected[0]) <= 5e-6


def test_the_sums_of_softmaxes_are_given():
    rows, lengths = [1, 0, 0], [7, 3, 3]
    queries, keys, values = case(2, 3, 7, 8, 3)
    sums = np.empty((3, 3), np.float32)
    assert np.array_equal(
        attend(queries, keys, values, rows, lengths, logsum_NH=sums), attend(queries, keys, values, rows, lengths)
    )
    for n, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        scores = np.einsum("hd,htd->ht", queries[n].astype(float), keys[row, :, :length].astype(float))
        assert off(sums[n], np.log(np.exp(scores).sum(1))) <= 1e-6
