"""How many clusters a promise needs: known before any certification data is decoded."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from lightning_mue.calibration.losses import TestResult, check_level
from lightning_mue.calibration.pvalues import MAX_BET, binomial_p, log_wealth
from lightning_mue.promise import UPPER, Promise

_KEEPS = (0.995, 0.99, 0.98, 0.97, 0.96, 0.95, 0.93, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)
_EXACT_UP_TO = 1_000_000  # beyond, the slow start of the bets is neglected (it adds less than 0.1 %)


def samples_needed(promise: Promise, confidence_level: float, full_score: float = 1.0, clustered: bool = False) -> int:
    """Return the smallest number of clusters at which even outputs identical to full depth would pass the test.

    Drawing clusters again finds identical outputs certain at any number. A metric of a corpus needs as many clusters as
    the promise that this share of outputs is identical.

    Args:
        promise: what is tested.
        confidence_level: of the promise, in (0, 1).
        full_score: mean full-depth score over clusters; not read for consistency or an absolute drop.
        clustered: whether clusters hold several samples (consistency is then tested by betting, not binomially).

    Raises:
        ValueError: an impossible level, or a fraction of a score of 0.
    """
    check_level(confidence_level)
    evidence, tolerance = -math.log1p(-confidence_level), promise.tolerance
    if promise.approximate:
        return samples_needed(Promise("consistency", keep=_share(promise)), confidence_level)
    if promise.metric == "consistency" and not clustered:
        n = max(1, math.ceil(evidence / -math.log1p(-tolerance) - 1e-9))
        return n if binomial_p(0, n, tolerance) <= 1 - confidence_level else n + 1  # the logarithms may round
    loss = promise.loss_of_full_depth(full_score)
    if not loss < tolerance:
        raise ValueError(
            f"The mean full-depth score must be above 0, got {full_score:g}: a model that scores nothing has nothing "
            "to keep; use the metric 'consistency'"
        )
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
    promise: Promise, confidence_level: float, full_score: float, clusters: int, clustered: bool = False
) -> str | None:
    """Return why ``clusters`` independent units cannot certify the promise, and what would do; None if they can.

    Args:
        promise: what is asked.
        confidence_level: of the promise, in (0, 1).
        full_score: mean full-depth score over clusters, measured on other data than will certify.
        clusters: independent units in the certify split.
        clustered: whether clusters hold several samples.
    """
    metric, asked = promise.metric, _share(promise)
    consistency = Promise("consistency", keep=asked)
    consistent = samples_needed(consistency, confidence_level, clustered=clustered)
    other = f"'consistency' (the same output on {asked:.1%} of inputs) needs {consistent}"
    if not promise.loss_of_full_depth(full_score) < promise.tolerance:
        return (
            f"The full-depth model scores 0 in {metric}, so there is no {metric} to keep: no number of clusters can "
            f"certify it. {other} and reads no references; there are {clusters}."
        )
    needed = samples_needed(promise, confidence_level, full_score, clustered)
    if clusters >= needed:
        return None
    ways = [] if metric == "consistency" else [other]
    lower = [
        weaker
        for weaker in _weaker(promise)
        if samples_needed(weaker, confidence_level, full_score, clustered) <= clusters
    ]
    ways.append(f"{_named(lower[0])} needs no more than there are" if lower else "no weaker promise of it would do")
    given = f" with a mean full-depth score of {full_score:.3f}" if promise.loss_of_full_depth(full_score) else ""
    return (
        f"{_named(promise)} of {metric} at {confidence_level:.0%} confidence needs at least {needed} clusters{given}, "
        f"even if every output were identical to full depth; there are {clusters}. Gather more, or ask for less: "
        f"{'; '.join(ways)}."
    )


def samples_estimate(result: TestResult, promise: Promise, confidence_level: float) -> int | None:
    """Return roughly how many clusters would have passed a test that failed, for an 80% chance; None if none would.

    ``1.5 max(2 ln(1/delta) sd^2 / margin^2, ln(1/delta) range / margin)``, with the observed mean and sd in place of
    the true ones: a rule of thumb, no promise.
    """
    margin = promise.tolerance - result.mean_loss
    if margin <= 0:
        return None
    evidence = -math.log1p(-confidence_level)
    reach = UPPER - promise.tolerance
    n = 1.5 * max(2 * evidence * result.sd**2 / margin**2, evidence * reach / margin)
    return max(math.ceil(n), result.clusters + 1)


def _passes(loss: float, tolerance: float, n: int, confidence_level: float) -> bool:
    wealth = log_wealth(np.full(n, loss), tolerance, UPPER, confidence_level).max()
    return bool(math.exp(-wealth) <= 1 - confidence_level)


def _share(promise: Promise) -> float:
    """Return the share that is kept, of a model that scores the highest if a drop was promised."""
    return promise.keep if promise.keep is not None else 1 - promise.tolerance


def _weaker(promise: Promise) -> list[Promise]:
    """Return promises of the same metric that ask for less, from the strongest on."""
    if promise.keep is not None:
        return [replace(promise, keep=keep) for keep in _KEEPS if keep < promise.keep]
    drops = [round(promise.highest * (1 - keep), 6) for keep in _KEEPS]
    return [replace(promise, drop=drop) for drop in drops if drop > (promise.drop or 0.0)]


def _named(promise: Promise) -> str:
    return f"keep={promise.keep:g}" if promise.keep is not None else f"drop={promise.drop:g}"
