"""Clusters: what was drawn independently (a picture with its questions). Its samples are joined first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def cluster_sums(values: np.ndarray, clusters: Sequence[str]) -> np.ndarray:
    """Return the sums of ``values``, ``[n]`` or ``[n, K]``, per cluster, in the order of the clusters' names.

    Raises:
        ValueError: not one cluster name per value.
    """
    values = np.asarray(values, np.float64)
    if len(clusters) != len(values):
        raise ValueError(f"Every sample needs a cluster: got {len(values)} samples and {len(clusters)} cluster names")
    names, index = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    sums = np.zeros((len(names), *values.shape[1:]))
    np.add.at(sums, index, values)
    return sums


def cluster_means(values: np.ndarray, clusters: Sequence[str]) -> np.ndarray:
    """Return the mean of ``values``, ``[n]``, per cluster, in the order of the clusters' names.

    Raises:
        ValueError: not one cluster name per value.
    """
    return cluster_sums(values, clusters) / cluster_sums(np.ones(len(values)), clusters)
