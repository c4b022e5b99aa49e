import numpy as np
import pytest

from lightning_mue.calibration.losses import TestResult, p_value
from lightning_mue.calibration.sample_size import samples_estimate, samples_needed, shortage
from lightning_mue.promise import Promise

NONE = np.zeros(0)


@pytest.mark.parametrize(("keep", "needed"), [(0.99, 299), (0.98, 149), (0.95, 59), (0.5, 5)])
def test_consistency_numbers_of_the_notes(keep, needed):
    assert samples_needed(Promise("consistency", keep), 0.95) == needed


@pytest.mark.parametrize("level", [0.5, 0.8, 0.95, 0.99])
@pytest.mark.parametrize("keep", [0.3, 0.5, 0.75, 0.9, 0.98, 0.99])
@pytest.mark.parametrize("case", [("consistency", 1, 1.0), ("consistency", 2, 1.0), ("accuracy", 1, 0.43)])
def test_one_cluster_fewer_would_not_do(case, keep, level):
    metric, per_cluster, mean = case

    def passes(clusters):
        names = [f"{i // per_cluster:06d}" for i in range(clusters * per_cluster)]
        full = np.full(len(names), mean)
        return p_value(Promise(metric, keep), full, full, np.ones(len(names), bool), names, level, 0).p <= 1 - level

    needed = samples_needed(Promise(metric, keep), level, mean, clustered=per_cluster > 1)
    assert passes(needed)
    assert needed == 1 or not passes(needed - 1)


def test_real_scores_need_hardly_more_than_their_mean_says():
    rng = np.random.default_rng(0)
    needed = int(1.05 * samples_needed(Promise("accuracy", 0.95), 0.95, 0.6))
    full = rng.permutation((np.arange(needed) < 0.6 * needed).astype(float))
    names = [f"{i:06d}" for i in range(needed)]
    assert p_value(Promise("accuracy", 0.95), full, full, full > 0, names, 0.95, 0).p <= 0.05


@pytest.mark.parametrize(("keep", "mean"), [(0.98, 0.5), (0.99, 0.9), (0.999, 0.3)])
def test_shortcut_for_huge_answers_is_close(monkeypatch, keep, mean):
    exact = samples_needed(Promise("accuracy", keep), 0.95, mean)
    monkeypatch.setattr("lightning_mue.calibration.sample_size._EXACT_UP_TO", 0)
    assert 0 <= exact - samples_needed(Promise("accuracy", keep), 0.95, mean) <= max(1, 0.001 * exact)


def test_huge_answers_come_quickly():
    assert samples_needed(Promise("accuracy", 0.9999), 0.95, 0.001) > 10_000_000
    with pytest.raises(ValueError, match="scores nothing has nothing to keep"):
        samples_needed(Promise("accuracy", 0.98), 0.95, 0.0)


def test_message_says_asked_found_and_what_would_do():
    assert shortage(Promise("consistency", 0.98), 0.95, 1.0, 149) is None
    text = shortage(Promise("accuracy", 0.98), 0.95, 0.5, 200)
    needed = samples_needed(Promise("accuracy", 0.98), 0.95, 0.5)
    assert f"keep=0.98 of accuracy at 95% confidence needs at least {needed} clusters" in text
    assert "there are 200" in text
    assert "'consistency' (the same output on 98.0% of inputs) needs 149" in text
    lower = float(text.split("keep=")[-1].split()[0])
    assert samples_needed(Promise("accuracy", lower), 0.95, 0.5) <= 200
    assert "scores 0 in accuracy" in shortage(Promise("accuracy", 0.98), 0.95, 0.0, 200)
    assert "no weaker promise" in shortage(Promise("consistency", 0.98), 0.95, 1.0, 2)


def test_estimate_after_a_failure_follows_the_rule_of_thumb():
    failed = TestResult(0.2, "", mean_loss=-0.005, n=500, clusters=500, sd=0.1)
    assert samples_estimate(failed, Promise("accuracy", 0.98), 0.95) == 3595  # 1.5 * 2 ln 20 * 400
    worse = TestResult(0.9, "", mean_loss=0.001, n=500, clusters=500, sd=0.1)
    assert samples_estimate(worse, Promise("accuracy", 0.98), 0.95) is None
