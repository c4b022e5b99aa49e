"""Hoeffding-Bentkus and fixed-sequence testing are those of MAPIE, which has both on its own."""

import numpy as np
import pytest

from lightning_mue.calibration.candidates import Candidate
from lightning_mue.calibration.certify import certify
from lightning_mue.calibration.decoded import Decoded
from lightning_mue.calibration.pvalues import binomial_p, hoeffding_bentkus_p
from lightning_mue.policy import ExitPolicy, ExitRule
from lightning_mue.promise import Promise

WHY = "MAPIE is not installed: pip install 'lightning-mue[test]'"
theirs = pytest.importorskip("mapie.risk_control.methods", reason=WHY)
control = pytest.importorskip("mapie.risk_control.fwer_control", reason=WHY)


def mapie_p(mean, n, tolerance, binary=False):
    return theirs.compute_hoeffding_bentkus_p_value(np.array([mean]), n, tolerance, binary)[0, 0]


@pytest.mark.parametrize("tolerance", [0.01, 0.05, 0.3])
@pytest.mark.parametrize("n", [2, 64, 512, 2048])  # powers of two: no mean of counts is rounded
def test_zero_one_losses(n, tolerance):
    for failures in {0, 1, n // 64, n // 16, n // 3, n}:
        losses = (np.arange(n) < failures).astype(float)
        assert hoeffding_bentkus_p(losses, tolerance) == pytest.approx(mapie_p(failures / n, n, tolerance), rel=1e-9)
        exact = mapie_p(failures / n, n, tolerance, binary=True)
        if failures <= n * tolerance:  # beyond, they go on to compare with Hoeffding's bound, which is 1 there
            assert binomial_p(failures, n, tolerance) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("tolerance", [0.01, 0.05, 0.3])
@pytest.mark.parametrize("n", [3, 100, 1000])
def test_graded_losses(n, tolerance):
    rng = np.random.default_rng(n)
    for share in (0.02, 0.1, 0.5, 1.0):
        losses = np.where(rng.random(n) < share, rng.beta(1, 9, n), 0.0)
        assert hoeffding_bentkus_p(losses, tolerance) == pytest.approx(mapie_p(losses.mean(), n, tolerance), rel=1e-9)


def accepted(changed, n, keep):
    """Return the links of a chain, by their numbers of changed outputs, that `certify` accepts."""
    names = [f"{i:04d}" for i in range(n)]
    policies = [ExitPolicy({"decoder": ExitRule("gate", (1,), (i / 100,))}) for i in range(len(changed))]
    count = {policy.to_json(): k for policy, k in zip(policies, changed, strict=True)}

    def decode(policy):
        return Decoded(names, names, {}, np.arange(n) >= count.get(policy.to_json(), 0))

    chain = [Candidate(p, 0.0, 50.0 - i, {}, 1.0, {}) for i, p in enumerate(policies)]
    promises = [Promise("consistency", keep=keep)]
    how = {"confidence_level": 0.95, "seed": 0, "clusters": names, "full_scores": {"": {}}}
    _, tests = certify(chain, decode, promises=promises, **how)
    return [i for i, test in enumerate(tests) if test.accepted]


def test_fixed_sequence():
    rng, n, keep = np.random.default_rng(0), 512, 0.95
    lengths = set()
    for _ in range(200):  # in no order: some links after a failure would pass
        changed = rng.binomial(n, rng.uniform(0.0, 0.045, 8))
        p = [mapie_p(k / n, n, 1 - keep, binary=True) for k in changed.tolist()]
        expected = control.control_fwer(np.array(p), 0.05, "fixed_sequence")
        assert accepted(changed.tolist(), n, keep) == expected.tolist()
        lengths.add(len(expected))
    assert lengths >= {0, 1, 2, 3, 8}
