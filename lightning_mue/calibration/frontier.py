"""The frontier: which candidates no other candidate beats in both risk and time."""

from __future__ import annotations

import numpy as np


def pareto(risk: np.ndarray, ms: np.ndarray) -> np.ndarray:
    """Return the indices of the frontier, from safe to bold: rising risk, strictly falling ms.

    Ties go to the lower index, so the result is determined by the order of the candidates.

    Args:
        risk: ``[m]``, lower is better.
        ms: ``[m]``, lower is better.
    """
    order = np.lexsort((np.arange(len(risk)), ms, risk))
    best = np.minimum.accumulate(ms[order])
    return order[np.append(True, ms[order][1:] < best[:-1])] if len(order) else order


def peel(risk: np.ndarray, ms: np.ndarray, enough: int) -> np.ndarray:
    """Return the indices of the frontier, the frontier of the rest, and so on, until there are ``enough``; sorted.

    Args:
        risk: ``[m]``, approximate.
        ms: ``[m]``.
        enough: stop once at least this many are kept (or nothing is left).
    """
    left = np.arange(len(risk))
    kept: list[int] = []
    while len(left) and len(kept) < enough:
        front = pareto(risk[left], ms[left])
        kept += left[front].tolist()
        left = np.delete(left, front)
    return np.array(sorted(kept), dtype=np.int64)
