"""p-values for the null hypothesis "the risk E[loss] exceeds the tolerance"; small means the promise may be made.

Each is valid for a finite sample: if the null holds, ``P(p <= u) <= u`` for every u. `n` independent losses a test.
"""

from __future__ import annotations

import math
import operator

import numpy as np
from scipy.special import rel_entr
from scipy.stats import binom

MAX_BET = 0.9
"""Largest bet, as a fraction of the bet that a single loss at the upper bound would ruin.

Just below 1, one early failure costs most of the wealth: 0.98 takes twice the samples where losses are 0 or 1. Far
below, small losses take long: 0.75 takes a quarter more. At 0.9 neither is more than a tenth off (tests/statistics).
"""

VARIANCE_PRIOR = 0.0025
"""Variance the bets start from (sd 0.05): most differences to full depth are 0. Any value is valid."""


def binomial_p(failures: int, n: int, tolerance: float) -> float:
    """Return the exact p-value of 0/1 losses: ``P(Bin(n, tolerance) <= failures)``.

    Args:
        failures: how many of the losses are 1; an integer, since a rounded ``n * mean`` may be one off.
        n: how many independent losses.
        tolerance: the risk allowed, in (0, 1).

    Raises:
        TypeError: a count is not an integer.
        ValueError: a count or the tolerance is out of range.
    """
    failures, n = operator.index(failures), operator.index(n)
    _check_tolerance(tolerance)
    if n < 1 or not 0 <= failures <= n:
        raise ValueError(f"`failures` must lie in 0..n with n >= 1, got {failures} of {n}")
    return float(binom.cdf(failures, n, tolerance))


def hoeffding_bentkus_p(losses: np.ndarray, tolerance: float) -> float:
    """Return the Hoeffding-Bentkus p-value of losses in [0, 1] (Bates et al. 2021; Learn-then-Test, Prop. 1).

    ``min(exp(-n h(min(mean, tolerance), tolerance)), e P(Bin(n, tolerance) <= ceil(n mean)))``. It sees only the mean:
    for graded losses `betting_p` is sharper.

    Args:
        losses: ``[n]``, each in [0, 1].
        tolerance: the risk allowed, in (0, 1).

    Raises:
        ValueError: a loss out of [0, 1] (signed losses need `betting_p`), or none at all.
    """
    losses = _as_losses(losses)
    _check_tolerance(tolerance)
    if losses.min() < 0 or losses.max() > 1:
        raise ValueError(
            f"Hoeffding-Bentkus needs losses in [0, 1], got [{losses.min():g}, {losses.max():g}]; "
            "use `betting_p` for signed losses"
        )
    n, total = len(losses), math.fsum(losses)  # exactly rounded, so that a sum of 0/1 losses has the right ceiling
    mean = min(total / n, tolerance)
    exponent = rel_entr(mean, tolerance) + rel_entr(1 - mean, 1 - tolerance)  # rel_entr(0, x) = 0: no 0 * log 0
    return float(min(1.0, math.exp(-n * exponent), math.e * binom.cdf(math.ceil(total), n, tolerance)))


def betting_p(
    losses: np.ndarray,
    tolerance: float,
    upper: float,
    confidence_level: float,
    seed: int,
    variance_prior: float = VARIANCE_PRIOR,
) -> float:
    """Return the betting p-value of losses bounded above (Waudby-Smith and Ramdas 2024, plug-in bets for planned n).

    ``1 / max_t K_t`` with the wealth of `log_wealth`: a non-negative supermartingale under the null, so Ville's
    inequality applies. Losses may be signed, however negative.

    Args:
        losses: ``[n]``, each at most ``upper``.
        tolerance: the risk allowed, below ``upper``.
        upper: the largest loss possible, not the largest seen.
        confidence_level: the bets are planned for this level; the p-value is valid for every level.
        seed: of the one permutation of the losses. Fix it before the data is seen: the best of several seeds is no
            p-value.
        variance_prior: variance the bets start from; fix it beforehand too.

    Raises:
        ValueError: a loss above ``upper``, not finite, or none at all.
    """
    losses = _as_losses(losses)
    if losses.max() > upper + 1e-9:
        raise ValueError(f"Betting needs losses of at most `upper` = {upper:g}, got {losses.max():g}")
    shuffled = np.random.default_rng(seed).permutation(losses)
    best = log_wealth(np.minimum(shuffled, upper), tolerance, upper, confidence_level, variance_prior).max()
    return float(min(1.0, math.exp(-best)))


def log_wealth(
    losses: np.ndarray,
    tolerance: float,
    upper: float,
    confidence_level: float,
    variance_prior: float = VARIANCE_PRIOR,
) -> np.ndarray:
    """Return the log wealth ``[n]`` after each bet against the null, in the given order of the losses.

    ``K_t = prod_{i<=t} (1 + nu_i (tolerance - L_i))``, ``nu_i = min(c, sqrt(2 ln(1/(1-confidence_level)) / (n v)))``;
    ``v`` is the running variance of the losses *before* i (Waudby-Smith and Ramdas 2024, predictable plug-in).

    Raises:
        ValueError: ``tolerance`` is not below ``upper``, or the level is not in (0, 1).
    """
    if not tolerance < upper:
        raise ValueError(f"`tolerance` must lie below the upper bound {upper:g} of the losses, got {tolerance:g}")
    if not 0 < confidence_level < 1:
        raise ValueError(f"`confidence_level` must lie in (0, 1), got {confidence_level:g}")
    n = len(losses)
    seen = np.arange(2, n + 2, dtype=np.float64)  # the prior counts as one loss at the tolerance
    mean = (tolerance + np.cumsum(losses)) / seen
    variance = (variance_prior + np.cumsum((losses - mean) ** 2)) / seen
    known = np.concatenate([[variance_prior], variance[:-1]])  # bet i may not see loss i
    planned = np.sqrt(-2 * math.log1p(-confidence_level) / (n * np.maximum(known, 1e-12)))
    bets = np.minimum(MAX_BET / (upper - tolerance), planned)
    return np.cumsum(np.log1p(bets * (tolerance - losses)))


def _as_losses(losses: np.ndarray) -> np.ndarray:
    losses = np.asarray(losses, dtype=np.float64)
    if losses.ndim != 1 or not len(losses):
        raise ValueError(f"Losses must be one row of at least one number, got shape {losses.shape}")
    if not np.isfinite(losses).all():
        raise ValueError(f"Losses must be finite, got {int((~np.isfinite(losses)).sum())} that are not")
    return losses


def _check_tolerance(tolerance: float) -> None:
    if not 0 < tolerance < 1:
        raise ValueError(f"`tolerance` must lie in (0, 1) for losses in [0, 1], got {tolerance:g}")
