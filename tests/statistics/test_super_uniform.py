"""p-values at the boundary (true risk = tolerance): P(p <= u) <= u, for every kind of loss."""

import numpy as np
import pytest

from lightning_mue.calibration.losses import p_value
from lightning_mue.calibration.pvalues import betting_p, binomial_p, hoeffding_bentkus_p
from lightning_mue.promise import Promise


def zero_one(rng, n):
    return (rng.random(n) < 0.05).astype(float), 0.05


def graded(rng, n):  # mostly 0, else Beta(1, 9) of mean 0.1
    return np.where(rng.random(n) < 0.5, rng.beta(1, 9, n), 0.0), 0.05


def signed(rng, n):  # gains pay for losses exactly
    return rng.choice([-1.0, 0.0, 1.0], n, p=[0.04, 0.92, 0.04]), 0.0


def retention(rng, n):  # accuracy 0.7, keep 0.95: drops just as large as allowed
    full = rng.random(n) < 0.7
    score = full & (rng.random(n) >= 0.05)
    return (0.95 * full - score) / 0.95, 0.0


def heavy_tail(
    rng, n
):  # bounded above by 1 only: rare losses of 1, gains of a Pareto tail (mean of 1 + pareto(2) is 2)
    return np.where(rng.random(n) < 0.02, 1.0, np.where(rng.random(n) < 0.1, -(1 + rng.pareto(2, n)), 0.0)), (
        0.02 - 0.98 * 0.1 * 2
    )


def captions(rng, n):  # CIDEr-D, a few times as large as most, capped; 5 % of answers score nothing: what keep allows
    full = np.minimum(rng.lognormal(0.0, 1.2, n), 10.0)
    scores = np.where(rng.random(n) < 0.05, 0.0, full)
    return Promise("cider", keep=0.95, cap=4.0).losses(scores, full, scores == full), 0.0


def rare_and_large(rng, n):  # a loss that most data sets of this size never show
    return (rng.random(n) < 0.004).astype(float), 0.004


TESTS = {
    "binomial": lambda x, a: binomial_p(int(x.sum()), len(x), a),
    "hoeffding-bentkus": hoeffding_bentkus_p,
    "betting": lambda x, a: betting_p(x, a, 1.0, 0.95, 0),
}
CASES = [
    ("binomial", zero_one),
    ("binomial", rare_and_large),
    ("hoeffding-bentkus", zero_one),
    ("hoeffding-bentkus", graded),
    ("betting", zero_one),
    ("betting", graded),
    ("betting", signed),
    ("betting", retention),
    ("betting", heavy_tail),
    ("betting", captions),
    ("betting", rare_and_large),
]


def check(method, draw, n, runs):
    rng = np.random.default_rng([n, runs])
    p = np.array([TESTS[method](*draw(rng, n)) for _ in range(runs)])
    for u in (0.01, 0.05, 0.1, 0.2, 0.5):
        slack = 3 * np.sqrt(u * (1 - u) / runs)
        assert (p <= u).mean() <= u + slack, (method, draw.__name__, n, u)
    return p


@pytest.mark.parametrize(("method", "draw"), CASES)
def test_small(method, draw):
    check(method, draw, 300, 1000)


@pytest.mark.long
@pytest.mark.parametrize("n", [30, 300, 2000])
@pytest.mark.parametrize(("method", "draw"), CASES)
def test_large(method, draw, n):
    check(method, draw, n, 4000)


def test_not_so_cautious_that_nothing_passes():
    assert (check("binomial", zero_one, 300, 1000) <= 0.05).mean() > 0.02
    assert (check("betting", retention, 300, 1000) <= 0.05).mean() > 0.02


def test_samples_of_one_cluster_count_once():
    """A picture's questions all fail together; taken as independent, they would pass far too often."""
    rng, promise, nothing, passed = np.random.default_rng(0), Promise("consistency", keep=0.95), np.zeros(0), []
    for seed in range(400):
        sizes = rng.integers(1, 10, 300)
        same = np.repeat(rng.random(300) >= 0.05, sizes)
        pictures, questions = np.repeat(np.arange(300), sizes).astype(str), np.arange(len(same)).astype(str)
        tests = [p_value(promise, nothing, nothing, same, names, 0.95, seed) for names in (pictures, questions)]
        passed.append([test.p <= 0.05 for test in tests])
    by_picture, by_question = np.mean(passed, axis=0)
    assert by_picture <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 400)
    assert by_question > 0.15


def test_the_check_would_notice_an_invalid_p_value():
    TESTS["plain mean"] = lambda x, a: float(x.mean() > a)
    with pytest.raises(AssertionError):
        check("plain mean", zero_one, 300, 300)
    TESTS["best of ten seeds"] = lambda x, a: min(betting_p(x, a, 1.0, 0.95, s) for s in range(10))
    with pytest.raises(AssertionError):
        check("best of ten seeds", retention, 300, 400)
