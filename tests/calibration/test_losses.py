import numpy as np
import pytest

from lightning_mue.calibration.clusters import cluster_means
from lightning_mue.calibration.losses import check_level, p_value
from lightning_mue.calibration.pvalues import betting_p, binomial_p
from lightning_mue.promise import Promise

NONE = np.zeros(0)


def test_impossible_promises_are_refused():
    with pytest.raises(ValueError, match=r"`keep` must lie in \(0, 1\) .* got 1.2"):
        Promise("accuracy", 1.2)
    for keep in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="`keep`"):
            Promise("accuracy", keep)
    with pytest.raises(ValueError, match=r"`metric` must be one of .* got 'meteor'"):
        Promise("meteor", 0.98)
    with pytest.raises(ValueError, match=r"`confidence_level` must lie in \(0, 1\), such as 0.95, got 95"):
        check_level(95)


def losses_of(keep, scores, full):
    return Promise("accuracy", keep).losses(scores, full, np.ones(len(scores), bool))


def test_retention_is_the_linear_statement():
    rng = np.random.default_rng(0)
    full, score = rng.random(1000), rng.random(1000)
    for keep in (0.5, 0.98):
        losses = losses_of(keep, score, full)
        assert losses.max() <= 1
        assert (losses.mean() <= 0) == (score.mean() >= keep * full.mean())
    assert losses_of(0.98, np.zeros(1), np.ones(1)) == 1.0  # the largest loss there is
    assert losses_of(0.5, np.ones(1), np.zeros(1)) == -2.0  # gains may pay for losses


def test_scores_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"`scores` of 'accuracy' must lie in \[0, 1\], got \[0, 1.5\]"):
        losses_of(0.9, np.array([0.0, 1.5]), np.ones(2))
    with pytest.raises(ValueError, match=r"`full_scores` of 'accuracy' must lie in \[0, 1\]"):
        losses_of(0.9, np.ones(1), np.array([np.nan]))
    with pytest.raises(ValueError, match="same samples"):
        losses_of(0.9, np.ones(2), np.ones(3))
    with pytest.raises(ValueError, match="must be boolean"):
        Promise("consistency", 0.98).losses(NONE, NONE, np.array([0, 1]))


def test_clusters_count_once():
    assert cluster_means(np.array([0.0, 1.0, 1.0, 1.0]), ["b", "a", "b", "b"]).tolist() == [1.0, 2 / 3]
    with pytest.raises(ValueError, match="got 2 samples and 1 cluster names"):
        cluster_means(np.zeros(2), ["a"])


def test_consistency_is_binomial_for_single_samples_and_betting_for_clusters():
    same = np.arange(500) >= 5
    alone = p_value(Promise("consistency", 0.95), NONE, NONE, same, [str(i) for i in range(500)], 0.95, 0)
    assert alone.method == "exact binomial"
    assert alone.p == binomial_p(5, 500, 1 - 0.95)
    assert (alone.n, alone.clusters, alone.mean_loss) == (500, 500, 0.01)
    names = [f"{i // 2:04d}" for i in range(500)]
    pairs = p_value(Promise("consistency", 0.95), NONE, NONE, same, names, 0.95, 0)
    assert pairs.method == "betting on cluster means"
    assert (pairs.n, pairs.clusters) == (500, 250)
    losses = cluster_means(~same, names)
    assert pairs.p == betting_p(losses, 1 - 0.95, 1.0, 0.95, 0)


def test_copies_of_a_sample_add_no_evidence():
    rng = np.random.default_rng(0)
    full = (rng.random(100) < 0.7).astype(float)
    once = p_value(Promise("accuracy", 0.9), full, full, full > 0, [f"{i:03d}" for i in range(100)], 0.95, 7)
    names = [f"{i // 5:03d}" for i in range(500)]
    copies = p_value(Promise("accuracy", 0.9), full.repeat(5), full.repeat(5), np.ones(500, bool), names, 0.95, 7)
    assert copies.p == pytest.approx(once.p, rel=1e-9)
    assert (copies.n, copies.clusters) == (500, 100)


def test_retention_allows_gains_to_pay_for_losses():
    full = np.r_[np.ones(700), np.zeros(300)]
    names = [f"{i:04d}" for i in range(1000)]
    score = full.copy()
    score[:20], score[-20:] = 0, 1
    swapped = p_value(Promise("accuracy", 0.95), score, full, full == score, names, 0.95, 0)
    assert swapped.p <= 0.05
    score[-20:] = 0
    lost = p_value(Promise("accuracy", 0.95), score, full, full == score, names, 0.95, 0)
    assert lost.p > swapped.p
    assert lost.mean_loss == pytest.approx((0.95 * 0.7 - 0.68) / 0.95)
