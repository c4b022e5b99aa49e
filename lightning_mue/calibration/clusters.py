"""Clusters: what was drawn independently (a picture with its questions). Its samples are joined first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def cluster_sums(values: np.ndarray, clusters: Sequence[str]) -> np.ndarray:
    """Return the sums of ``values``, ``[n]`` or ``[n, K]``, per cluster, in the order of the clusters' names.

    Raises:
        ValueError: not one cluster name per value.
    """
    values, index = np.asarray(values, np.float64), _numbered(values, clusters)
    sums = np.zeros((index.max(initial=-1) + 1, *values.shape[1:]))
    np.add.at(sums, index, values)
    return sums


def cluster_means(values: np.ndarray, clusters: Sequence[str]) -> np.ndarray:
    """Return the mean of ``values``, ``[n]``, per cluster, in the order of the clusters' names.

    Raises:
        ValueError: not one cluster name per value.
    """
    index = _numbered(values, clusters)
    return np.bincount(index, np.asarray(values, np.float64)) / np.bincount(index)


def _numbered(values: np.ndarray, clusters: Sequence[str]) -> np.ndarray:
    """Return the number of each value's cluster, ``[n]``."""
    if len(clusters) != len(values):
        raise ValueError(f"Every sample needs a cluster: got {len(values)} samples and {len(clusters)} cluster names")
    return np.unique(np.asarray(clusters, dtype=str), return_inverse=True)[1]
