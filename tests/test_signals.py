"""Signals against scipy and by hand."""

import pytest
import torch
from scipy.spatial.distance import cosine
from scipy.special import softmax

from lightning_mue.signals import confidence, margin, similarity


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


def test_a_closed_answer_set_leaves_finite_scores():
    logits = torch.full((2, 9), float("-inf"))
    logits[:, 3] = 1.0
    assert confidence(logits).tolist() == [1.0, 1.0]
    assert margin(logits).tolist() == [1.0, 1.0]
