"""Signals against scipy and by hand."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cosine
from scipy.special import softmax
from scipy.stats import entropy as entropy_in_nats

from lightning_mue.policy import SIGNAL_RANGES
from lightning_mue.signals import NEEDS_LOGITS, OF_LOGITS, confidence, entropy, flat_similarity, margin, similarity


def test_similarity_is_the_mean_cosine_of_valid_tokens():
    h, before = torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    valid = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]).bool()
    found = similarity(h, before, valid)
    for row, length in enumerate([5, 2, 1]):
        expected = sum(1 - cosine(h[row, t], before[row, t]) for t in range(length)) / length
        assert found[row].item() == pytest.approx(expected, abs=1e-6)
    changed = h.clone()
    changed[1, 2:] = 100.0  # padding must not matter
    assert torch.equal(similarity(changed, before, valid)[1], found[1])
    assert similarity(h, h).tolist() == pytest.approx([1.0] * 3)
    assert similarity(-h, h).tolist() == pytest.approx([-1.0] * 3)


def test_confidence_and_margin():
    logits = torch.randn(4, 11) * 3
    probabilities = softmax(logits.numpy(), axis=-1)
    probabilities.sort(axis=-1)
    assert confidence(logits).tolist() == pytest.approx(probabilities[:, -1].tolist(), abs=1e-6)
    assert margin(logits).tolist() == pytest.approx((probabilities[:, -1] - probabilities[:, -2]).tolist(), abs=1e-6)


def test_entropy_is_one_minus_that_of_scipy_over_its_maximum():
    logits = torch.randn(4, 6, 11) * 3
    expected = 1 - entropy_in_nats(softmax(logits.double().numpy(), axis=-1), axis=-1) / np.log(11)
    np.testing.assert_allclose(entropy(logits).numpy(), expected, atol=1e-6)
    assert entropy(torch.zeros(2, 11)).tolist() == pytest.approx([0, 0], abs=1e-6)
    assert entropy(torch.tensor([[100.0, 0.0, 0.0]])).tolist() == [1.0]


def test_flat_similarity_is_one_cosine_of_all_numbers():
    h, before = torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    expected = 1 - cosine(h.flatten(), before.flatten())
    assert flat_similarity(h, before).tolist() == pytest.approx([expected] * 3, abs=1e-6)
    assert flat_similarity(h[:, 0], before[:, 0]).shape == (3,)
    changed = h.clone()
    changed[2] = 100.0
    assert flat_similarity(changed, before)[0] != flat_similarity(h, before)[0]  # who else is in the batch matters
    assert flat_similarity(h, h).tolist() == pytest.approx([1.0] * 3)


@pytest.mark.parametrize("signal", sorted(OF_LOGITS))
def test_signals_of_logits_keep_their_range_in_every_precision(signal):
    assert signal in NEEDS_LOGITS
    low, high = SIGNAL_RANGES[signal]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for scale in (1e-4, 1.0, 50.0):
            found = OF_LOGITS[signal]((torch.randn(64, 31) * scale).to(dtype))
            assert found.dtype == torch.float32
            assert ((low <= found) & (found <= high)).all()


def test_a_closed_answer_set_leaves_finite_scores():
    logits = torch.full((2, 9), float("-inf"))
    logits[:, 3] = 1.0
    assert confidence(logits).tolist() == [1.0, 1.0]
    assert margin(logits).tolist() == [1.0, 1.0]
    assert entropy(logits).tolist() == [1.0, 1.0]
    logits[:, 5] = 1.0  # two tokens of nine, equally likely
    assert entropy(logits).tolist() == pytest.approx([1 - np.log(2) / np.log(9)] * 2)
