"""How many clusters a promise needs: known before any certification data is decoded."""

from __future__ import annotations

import math

import numpy as np

from lightning_mue.calibration.losses import UPPER, TestResult, check_promise, tolerance_of
from lightning_mue.calibration.pvalues import MAX_BET, binomial_p, log_wealth

_KEEPS = (0.995, 0.99, 0.98, 0.97, 0.96, 0.95, 0.93, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)
_EXACT_UP_TO = 1_000_000  # beyond, the slow start of the bets is neglected (it adds less than 0.1 %)


def samples_needed(
    metric: str, keep: float, confidence_level: float, full_score_mean: float = 1.0, clustered: bool = False
) -> int:
    """Return the smallest number of clusters at which even outputs identical to full depth would pass the test.

    Args:
        metric: one of ``accuracy``, ``exact_match``, ``consistency``.
        keep: the fraction to keep, in (0, 1).
        confidence_level: of the promise, in (0, 1).
        full_score_mean: mean full-depth score over clusters, in (0, 1]; not read for consistency.
        clustered: whether clusters hold several samples (consistency is then tested by betting, not binomially).

    Raises:
        ValueError: an impossible promise, or ``full_score_mean`` not in (0, 1].
    """
    check_promise(keep, metric, confidence_level)
    evidence = -math.log1p(-confidence_level)
    tolerance = tolerance_of(metric, keep)
    if metric == "consistency" and not clustered:
        n = max(1, math.ceil(evidence / -math.log1p(-tolerance) - 1e-9))
        return n if binomial_p(0, n, tolerance) <= 1 - confidence_level else n + 1  # the logarithms may round
    if metric != "consistency" and not 0 < full_score_mean <= 1:
        raise ValueError(
            f"`full_score_mean` must lie in (0, 1], got {full_score_mean:g}: a model that scores nothing has nothing "
            "to keep; use the metric 'consistency'"
        )
    loss = 0.0 if metric == "consistency" else -full_score_mean * (1 - keep) / keep
    low = max(1, math.ceil(evidence / math.log1p(MAX_BET / (UPPER - tolerance) * (tolerance - loss)) - 1e-9))
    if low > _EXACT_UP_TO:
        return low
    high = low
    while not _passes(loss, tolerance, high, confidence_level):
        low, high = high + 1, high * 2
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _passes(loss, tolerance, middle, confidence_level) else (middle + 1, high)
    return low


def shortage(
    metric: str, keep: float, confidence_level: float, full_score_mean: float, clusters: int, clustered: bool = False
) -> str | None:
    """Return why ``clusters`` independent units cannot certify the promise, and what would do; None if they can.

    Args:
        metric: one of ``accuracy``, ``exact_match``, ``consistency``.
        keep: the fraction to keep, in (0, 1).
        confidence_level: of the promise, in (0, 1).
        full_score_mean: mean full-depth score over clusters, measured on other data than will certify.
        clusters: independent units in the certify split.
        clustered: whether clusters hold several samples.
    """
    check_promise(keep, metric, confidence_level)
    consistent = samples_needed("consistency", keep, confidence_level, clustered=clustered)
    other = f"'consistency' (the same output on {keep:.1%} of inputs) needs {consistent}"
    if metric != "consistency" and not full_score_mean > 0:
        return (
            f"The full-depth model scores 0 in {metric}, so there is no {metric} to keep: no number of clusters can "
            f"certify it. {other} and reads no references; there are {clusters}."
        )
    needed = samples_needed(metric, keep, confidence_level, full_score_mean, clustered)
    if clusters >= needed:
        return None
    ways = [] if metric == "consistency" else [other]
    lower = [
        k for k in _KEEPS if k < keep and _enough(metric, k, confidence_level, full_score_mean, clusters, clustered)
    ]
    ways.append(f"keep={lower[0]:g} needs no more than there are" if lower else "no lower `keep` down to 0.5 would do")
    given = "" if metric == "consistency" else f" with a mean full-depth score of {full_score_mean:.3f}"
    return (
        f"keep={keep:g} of {metric} at {confidence_level:.0%} confidence needs at least {needed} clusters{given}, even "
        f"if every output were identical to full depth; there are {clusters}. Gather more, or ask for less: "
        f"{'; '.join(ways)}."
    )


def samples_estimate(result: TestResult, metric: str, keep: float, confidence_level: float) -> int | None:
    """Return roughly how many clusters would have passed a test that failed, for an 80% chance; None if none would.

    ``1.5 max(2 ln(1/delta) sd^2 / margin^2, ln(1/delta) range / margin)``, with the observed mean and sd in place of
    the true ones: a rule of thumb, no promise.
    """
    margin = tolerance_of(metric, keep) - result.mean_loss
    if margin <= 0:
        return None
    evidence = -math.log1p(-confidence_level)
    reach = UPPER - tolerance_of(metric, keep)
    n = 1.5 * max(2 * evidence * result.sd**2 / margin**2, evidence * reach / margin)
    return max(math.ceil(n), result.clusters + 1)


def _passes(loss: float, tolerance: float, n: int, confidence_level: float) -> bool:
    wealth = log_wealth(np.full(n, loss), tolerance, UPPER, confidence_level).max()
    return bool(math.exp(-wealth) <= 1 - confidence_level)


def _enough(
    metric: str, keep: float, confidence_level: float, full_score_mean: float, clusters: int, clustered: bool
) -> bool:
    return samples_needed(metric, keep, confidence_level, full_score_mean, clustered) <= clusters
