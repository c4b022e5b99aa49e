"""Signals of arrays are those of tensors."""

import numpy as np
import pytest
import torch

from lightning_mue import signals
from lightning_mue.exits.gate import pool, top_two
from lightning_mue.inference import array_signals


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def logits(scale):
    found = normal(6, 31) * scale
    found[1, 5:] = -np.inf  # what a constraint forbids
    found[2, 1:] = -np.inf
    found[3] = 0
    return found


@pytest.mark.parametrize("signal", sorted(signals.OF_LOGITS))
@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
def test_of_logits(signal, scale):
    x = logits(np.float32(scale))
    expected = signals.OF_LOGITS[signal](torch.from_numpy(x)).numpy()
    found = array_signals.OF_LOGITS[signal](x)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert array_signals.OF_LOGITS.keys() == signals.OF_LOGITS.keys()
    assert array_signals.NEEDS_LOGITS == signals.NEEDS_LOGITS


def test_similarities():
    h, before, valid = normal(3, 5, 8), normal(3, 5, 8, seed=1), np.arange(5) < np.array([[5], [2], [1]])
    before[0, 0] = 0  # no direction
    given = [torch.from_numpy(x) for x in (h, before, valid)]
    for arrays, tensors in (((h, before), given[:2]), ((h, before, valid), given)):
        expected = signals.similarity(*tensors).numpy()
        np.testing.assert_allclose(array_signals.similarity(*arrays), expected, atol=1e-6)
    expected = signals.flat_similarity(*given[:2]).numpy()
    np.testing.assert_allclose(array_signals.flat_similarity(h, before), expected, atol=1e-6)


def test_what_gates_read():
    h, valid, x = normal(3, 5, 8), np.arange(5) < np.array([[5], [2], [0]]), logits(np.float32(30))
    for of_rows in (None, valid):
        expected = pool(torch.from_numpy(h), None if of_rows is None else torch.from_numpy(of_rows))
        np.testing.assert_allclose(array_signals.pool(h, of_rows), expected.numpy(), atol=1e-6)
    expected = top_two(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(array_signals.log_odds_of_two(x), expected, rtol=2e-2, atol=1e-4)  # near 1 bits are few
    numbers = np.array([-1e4, -3, 0, 3, 1e4], np.float32)
    np.testing.assert_allclose(array_signals.sigmoid(numbers), torch.from_numpy(numbers).sigmoid(), atol=1e-7)
