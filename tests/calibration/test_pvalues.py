import math
from fractions import Fraction

import numpy as np
import pytest

from lightning_mue.calibration.pvalues import MAX_BET, betting_p, binomial_p, hoeffding_bentkus_p, log_wealth


@pytest.mark.parametrize("n", [1, 2, 7, 12])
@pytest.mark.parametrize("tolerance", [0.01, 0.3, 0.75])
def test_binomial_equals_the_sum_over_outcomes(n, tolerance):
    a = Fraction(tolerance)
    for failures in range(n + 1):
        exact = sum(math.comb(n, k) * a**k * (1 - a) ** (n - k) for k in range(failures + 1))
        assert binomial_p(failures, n, tolerance) == pytest.approx(float(exact), rel=1e-12)


def test_binomial_needs_integer_counts():
    assert binomial_p(np.int64(3), 100, 0.1) == binomial_p(3, 100, 0.1)
    with pytest.raises(TypeError):
        binomial_p(0.29 * 100, 100, 0.5)  # 28.999999999999996: a rounded count would be one off
    with pytest.raises(ValueError, match="got 5 of 4"):
        binomial_p(5, 4, 0.1)
    with pytest.raises(ValueError, match=r"`tolerance` must lie in \(0, 1\)"):
        binomial_p(1, 4, 0.0)


@pytest.mark.parametrize("failures", [0, 1, 5, 12])
def test_hoeffding_bentkus_equals_its_formula(failures):
    n, a = 12, 0.2
    losses = np.r_[np.ones(failures), np.zeros(n - failures)]
    m = min(failures / n, a)
    h = sum(x * math.log(x / y) for x, y in ((m, a), (1 - m, 1 - a)) if x > 0)
    expected = min(1, math.exp(-n * h), math.e * binomial_p(failures, n, a))
    assert hoeffding_bentkus_p(losses, a) == pytest.approx(expected, rel=1e-12)


def test_no_loss_at_all_gives_a_number():  # 0 * log 0
    p = hoeffding_bentkus_p(np.zeros(300), 0.01)
    assert p == pytest.approx(0.99**300)
    assert np.isfinite(betting_p(np.zeros(300), 0.01, 1.0, 0.95, 0))
    assert hoeffding_bentkus_p(np.ones(5), 0.01) == 1.0


def test_ceiling_of_the_summed_losses_is_not_one_off():
    losses = np.full(100, 0.29)  # 0.29 * 100 = 28.999999999999996, naive sums 29.000000000000014 (ceiling 30)
    assert math.ceil(math.fsum(losses)) == 29
    assert hoeffding_bentkus_p(losses, 0.99) <= math.e * binomial_p(29, 100, 0.99)


def test_signed_losses_are_refused_where_the_bound_is_zero_to_one():
    with pytest.raises(ValueError, match=r"needs losses in \[0, 1\], got \[-0.2, 0.1\]; use `betting_p`"):
        hoeffding_bentkus_p(np.array([0.1, -0.2]), 0.05)
    assert betting_p(np.array([0.1, -0.2]), 0.05, 1.0, 0.95, 0) <= 1


def test_losses_above_the_bound_and_not_finite_are_refused():
    with pytest.raises(ValueError, match=r"at most `upper` = 1, got 1.5"):
        betting_p(np.array([0.0, 1.5]), 0.1, 1.0, 0.95, 0)
    for bad in (np.array([np.nan]), np.array([-np.inf]), np.array([]), np.zeros((2, 2))):
        with pytest.raises(ValueError, match="Losses must be"):
            betting_p(bad, 0.1, 1.0, 0.95, 0)
    with pytest.raises(ValueError, match="must lie below the upper bound"):
        betting_p(np.array([0.0]), 1.0, 1.0, 0.95, 0)


def test_wealth_equals_a_plain_loop():
    losses = np.random.default_rng(0).choice([-0.5, 0.0, 0.1, 1.0], 60)
    tolerance, upper, level, prior = 0.05, 1.0, 0.9, 0.01
    wealth, total, squares, variance, expected = 1.0, tolerance, prior, prior, []
    for i, loss in enumerate(losses):
        bet = min(MAX_BET / (upper - tolerance), math.sqrt(2 * math.log(1 / (1 - level)) / (len(losses) * variance)))
        wealth *= 1 + bet * (tolerance - loss)
        total += loss
        squares += (loss - total / (i + 2)) ** 2
        variance = squares / (i + 2)
        expected.append(wealth)
    assert np.exp(log_wealth(losses, tolerance, upper, level, prior)) == pytest.approx(expected, rel=1e-9)


def test_bets_never_see_the_loss_they_are_placed_on():
    losses = np.random.default_rng(1).random(40) - 0.6
    before = log_wealth(losses, 0.0, 1.0, 0.95)
    for i in (
        0,
        7,
        39,
    ):  # the gain of step i, as a function of loss i, is a straight line: the bet does not depend on it
        gains = []
        for loss in (-0.4, 0.0, 0.4):
            changed = losses.copy()
            changed[i] = loss
            wealth = np.exp(log_wealth(changed, 0.0, 1.0, 0.95))
            gains.append(wealth[i] / (wealth[i - 1] if i else 1.0))
        assert gains[0] + gains[2] == pytest.approx(2 * gains[1], rel=1e-12)
        assert gains[1] == pytest.approx(1.0)
    assert len(before) == 40


def test_expected_wealth_is_at_most_one_under_the_null():  # all 2^10 sequences at the boundary, exactly
    tolerance, n = 0.25, 10
    total, too_rich = 0.0, 0.0
    for code in range(2**n):
        losses = np.array([(code >> i) & 1 for i in range(n)], dtype=float)
        weight = float(np.prod(np.where(losses == 1, tolerance, 1 - tolerance)))
        wealth = log_wealth(losses, tolerance, 1.0, 0.8)
        total += weight * math.exp(wealth[-1])
        too_rich += weight * (wealth.max() >= math.log(5))
    assert total == pytest.approx(1.0, rel=1e-9)
    assert too_rich <= 0.2


def test_seed_fixes_the_order_and_nothing_else():
    losses = (np.arange(400) < 20).astype(float)
    assert betting_p(losses, 0.1, 1.0, 0.95, 3) == betting_p(losses, 0.1, 1.0, 0.95, 3)
    values = {betting_p(losses, 0.1, 1.0, 0.95, seed) for seed in range(5)}
    assert len(values) > 1  # the order matters: unshuffled, the losses of the data's order would decide
