"""The whole procedure breaks its promise in at most 1 - confidence_level of calibrations (notes, table D)."""

import numpy as np
import pytest

from lightning_mue.calibration.candidates import Candidate
from lightning_mue.calibration.certify import certify
from lightning_mue.calibration.decoded import Decoded
from lightning_mue.policy import ExitPolicy, ExitRule


def make_chain(count):
    policies = [ExitPolicy({"decoder": ExitRule("gate", (1,), (i / 100,))}) for i in range(count)]
    return [Candidate(p, i / 100, i / 10, 50.0 - i, 0.7, 1.0, {}) for i, p in enumerate(policies)]


def chosen(rng, chain, risks, n, metric, keep, seed):
    """Return the index of the certified policy, -1 for full depth; data drawn afresh."""
    names = [f"{i:05d}" for i in range(n)]
    full = (rng.random(n) < 0.7).astype(float)
    luck = rng.random(n)  # one sample is hard for every policy: the tests are dependent, as they really are
    index = {c.policy.to_json(): i for i, c in enumerate(chain)}

    def decode(policy):
        i = index.get(policy.to_json(), -1)
        changed = luck < (0.0 if i < 0 else risks[i])
        return Decoded(names, names, np.where(changed, 0.0, full), ~changed)

    policy, _ = certify(
        chain, decode, metric=metric, keep=keep, confidence_level=0.95, seed=seed, clusters=names, full_score_mean=0.7
    )
    return next((i for i, c in enumerate(chain) if c.policy.rules == policy.rules), -1)


def violations(risks, n, metric, keep, runs):
    """Return how often the chosen policy's true risk is above the allowed one, and the mean chosen risk / allowed."""
    rng, chain = np.random.default_rng(runs), make_chain(len(risks))
    allowed = 1 - keep  # accuracy: scores fall by the factor 1 - risk, so 1 - keep as well
    picked = [chosen(rng, chain, risks, n, metric, keep, seed) for seed in range(runs)]
    true = np.array([0.0 if i < 0 else risks[i] for i in picked])
    return (true > allowed).mean(), true.mean() / allowed


TABLE_D = np.linspace(0.2, 1.6, 10)
CLIFF = np.array([0.0, 1.0001])  # the second is just out of bounds: the most that may go wrong


@pytest.mark.parametrize(("metric", "keep", "n"), [("consistency", 0.98, 1000), ("accuracy", 0.95, 1000)])
@pytest.mark.parametrize("shape", [TABLE_D, CLIFF], ids=["table D", "cliff"])
def test_small(metric, keep, n, shape):
    rate, used = violations(shape * (1 - keep), n, metric, keep, 250)
    assert rate <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 250)
    if shape is TABLE_D:
        assert rate <= 0.05
        assert used > 0.3  # and it is of use


@pytest.mark.slow
@pytest.mark.parametrize(("metric", "keep", "n"), [("consistency", 0.99, 2500), ("accuracy", 0.95, 1000)])
@pytest.mark.parametrize("shape", [TABLE_D, CLIFF], ids=["table D", "cliff"])
def test_large(metric, keep, n, shape):
    rate, _ = violations(shape * (1 - keep), n, metric, keep, 400)
    assert rate <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 400)


def test_the_usual_way_would_break_its_word():
    """Picking the boldest whose observed loss is within the tolerance fails a fifth to two fifths of the time."""
    rng, broken = np.random.default_rng(0), 0
    for _ in range(300):
        luck = rng.random(1000)
        seen = np.array([(luck < r).mean() for r in TABLE_D * 0.01])
        within = np.flatnonzero(seen <= 0.01)
        broken += len(within) > 0 and TABLE_D[within[-1]] > 1
    assert broken / 300 > 0.2
