"""What is drawn has the distribution that was asked for."""

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import chisquare, kstest
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lightning_mue.inference.sampling import Sampling
from lightning_mue.inference.screened_head import ScreenedHead

DRAWS = 20_000


def draw(logits_V, **how):
    sampling = Sampling(seed=3, **how)
    rows = np.arange(DRAWS)
    noise_RV = sampling.noise(rows, rows % 7, len(logits_V))
    return sampling.perturbed(np.tile(logits_V, (DRAWS, 1)), noise_RV).argmax(1)


@pytest.mark.parametrize(
    "how", [{}, {"temperature": 0.7}, {"temperature": 1.8, "top_k": 5}, {"temperature": 0.9, "top_p": 0.8}]
)
def test_frequencies_are_those_of_the_softmax(how):
    logits_V = np.random.default_rng(0).normal(size=12).astype(np.float32)
    p_V = softmax(warped(logits_V[None], **how)[0].astype(np.float64))
    counts_V = np.bincount(draw(logits_V, **how), minlength=12)
    assert not counts_V[p_V == 0].any()
    assert chisquare(counts_V[p_V > 0], DRAWS * p_V[p_V > 0]).pvalue > 1e-3


def warped(logits_RV, temperature=1.0, top_k=0, top_p=1.0):
    """Transformers' warpers in the order of its ``generate``."""
    found = TemperatureLogitsWarper(temperature)(None, torch.from_numpy(logits_RV))
    found = found if top_k == 0 else TopKLogitsWarper(top_k)(None, found)
    return (found if top_p == 1 else TopPLogitsWarper(top_p)(None, found)).numpy()


@pytest.mark.parametrize("top_k", [0, 1, 7, 500])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 1e-6])
def test_filters_are_those_of_transformers(top_k, top_p):
    rng = np.random.default_rng(1)
    logits_RV = (rng.normal(size=(16, 300)) * 3).astype(np.float32)
    logits_RV[:, ::5] = -np.inf
    logits_RV[:4, 1::7] = logits_RV[:4, 1:2]  # equal ones
    how = {"temperature": 0.6, "top_k": top_k, "top_p": top_p}
    found_RV = Sampling(**how).perturbed(logits_RV, np.zeros_like(logits_RV))
    if top_p < 1:  # of equal tokens at the bar either may stay
        logits_RV, found_RV = logits_RV[4:], found_RV[4:]
    np.testing.assert_array_equal(found_RV, warped(logits_RV, **how))


def test_noise_is_gumbel_and_independent_of_what_is_asked_with_it():
    sampling = Sampling(seed=11)
    noise_RV = sampling.noise([0, 1, 0], [0, 0, 1], 30_000)
    for row in noise_RV:
        assert kstest(row, "gumbel_r").pvalue > 1e-3
    assert abs(np.corrcoef(noise_RV)[np.triu_indices(3, 1)]).max() < 0.03
    np.testing.assert_array_equal(sampling.noise([1], [0], 100), noise_RV[1:2, :100])
    np.testing.assert_array_equal(sampling.of_rows([4, 1]).noise([1], [0], 100), noise_RV[1:2, :100])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_screened_head_draws_what_all_scores_draw(temperature):
    rng = np.random.default_rng(2)
    weight_VD, h_RD = (rng.normal(size=shape).astype(np.float32) * 0.3 for shape in ((4000, 64), (40, 64)))
    sampling = Sampling(temperature)
    noise_RV = sampling.noise(np.arange(40), np.zeros(40), 4000)
    head = ScreenedHead(weight_VD, threads=1)
    found_R = head.argmax(h_RD, lambda rows_R, score_RV: sampling.perturbed(score_RV, noise_RV[rows_R]))
    exact_RV = h_RD.astype(np.float64) @ weight_VD.T.astype(np.float64)
    assert found_R.tolist() == (exact_RV / temperature + noise_RV).argmax(1).tolist()
    assert head.candidates < 40 * 400
    assert head.full_rows == 0
