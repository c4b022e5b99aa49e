import json
import math
from dataclasses import replace

import numpy as np
import pytest

from lightning_mue.calibration.candidates import Candidate
from lightning_mue.calibration.certify import Provenance, certify, split_hash, uncertified
from lightning_mue.calibration.decoded import Decoded
from lightning_mue.policy import ExitPolicy, ExitRule, chain_hash
from lightning_mue.promise import Promise

IDS = [f"s{i:05d}" for i in range(1000)]
FULL = (np.arange(1000) % 10 < 7).astype(float)


def candidates(count):
    policies = [
        ExitPolicy({"decoder": ExitRule("gate", (1,), (0.9 - 0.1 * i,))}, fingerprint="abc") for i in range(count)
    ]
    return [Candidate(p, 0.1 * i, 50.0 - i, {"accuracy": 0.7}, 1.0, {"decoder": 3.0}) for i, p in enumerate(policies)]


class Engine:
    """Decodes from a table: how many of the first outputs each policy changes (and gets wrong)."""

    def __init__(self, chain, changed, order=None, repeat=0):
        self.changed = {c.policy.to_json(): k for c, k in zip(chain, changed, strict=True)}
        self.calls = []
        self.index = np.r_[np.arange(1000) if order is None else order, np.arange(repeat)]

    def __call__(self, policy):
        self.calls.append(policy)
        wrong = np.arange(1000) < self.changed.get(policy.to_json(), 0)
        scores, i = np.where(wrong, 0.0, FULL), self.index
        return Decoded([IDS[k] for k in i], [IDS[k] for k in i], {"accuracy": scores[i]}, ~wrong[i])


def run(chain, engine, metric="consistency", keep=0.98, **options):
    defaults = {"confidence_level": 0.95, "seed": 0, "clusters": IDS, "full_scores": {"": {"accuracy": 0.7}}}
    return certify(chain, engine, promises=[Promise(metric, keep)], **(defaults | {"estimate": False} | options))


def test_the_last_that_passed_is_kept_not_the_first_that_failed():
    chain = candidates(5)
    engine, seen = Engine(chain, [0, 3, 6, 100, 0]), []
    policy, tests = run(chain, engine, on_tested=seen.append)
    assert policy.rules == chain[2].policy.rules
    assert [t.accepted for t in tests] == [True, True, True, False]  # the fifth is never looked at, though harmless
    assert seen == tests
    assert engine.calls == [ExitPolicy.full_depth(), *(c.policy for c in chain[:4])]
    assert policy.certificate.evidence[0].p_value == tests[2].result.p <= 0.05
    assert policy.certificate.evidence[0].mean_loss == 0.006


def test_all_may_pass_and_the_fastest_by_prediction_wins():
    chain = candidates(3)
    policy, tests = run(chain, Engine(chain, [0, 0, 0]))
    assert all(t.accepted for t in tests)
    assert policy.rules == chain[2].policy.rules
    chain[1] = replace(chain[1], ms=1.0)
    policy, _ = run(chain, Engine(chain, [0, 0, 0]))
    assert policy.rules == chain[1].policy.rules


def test_certificate_says_what_was_done():
    chain = candidates(2)
    provenance = Provenance(data_fingerprint="data", decode={"max_new_tokens": 8}, note="selection_reused")
    policy, _ = run(chain, Engine(chain, [0, 1]), "accuracy", 0.95, seed=7, provenance=provenance)
    c = policy.certificate
    assert (c.kind, c.promise, c.confidence_level, c.seed) == ("certified", Promise("accuracy", 0.95), 0.95, 7)
    (found,) = c.evidence
    assert (found.n, found.clusters, found.method) == (1000, 1000, "betting on cluster means")
    assert (found.score_full_depth, found.score) == (pytest.approx(0.7), pytest.approx(0.699))
    assert found.kept == pytest.approx(0.699 / 0.7)
    assert c.chain_hash == chain_hash([k.policy for k in chain])
    assert c.split_hash == split_hash(IDS[::-1])
    assert (c.data_fingerprint, c.decode, c.note) == ("data", {"max_new_tokens": 8}, "selection_reused")
    assert set(c.versions) == {"lightning_mue", "numpy", "scipy"}
    assert policy.fingerprint == "abc"
    assert ExitPolicy.from_json(policy.to_json()) == policy
    assert "keeps at least 95.0% of the full-depth accuracy" in c.in_words()
    assert not {"time", "host", "date"} & set(json.loads(policy.to_json())["certificate"])


def test_same_bytes_for_any_order_of_samples_and_repeats():
    chain = candidates(2)
    expected, _ = run(chain, Engine(chain, [2, 90]), "accuracy", 0.95)
    order = np.random.default_rng(0).permutation(1000)
    found, _ = run(chain, Engine(chain, [2, 90], order, repeat=24), "accuracy", 0.95)
    assert found.to_json() == expected.to_json()


def test_too_few_clusters_decodes_nothing():
    chain = candidates(2)
    engine = Engine(chain, [0, 0])
    policy, tests = run(chain, engine, "accuracy", 0.98, clusters=IDS[:100])
    assert (engine.calls, tests) == ([], [])
    assert policy.is_full_depth
    assert policy.certificate.kind == "full depth"
    assert "there are 100" in policy.certificate.note
    assert policy.fingerprint == "abc"
    repeated, _ = run(chain, engine, clusters=[f"c{i // 10}" for i in range(1000)])  # 1000 samples of 100 pictures
    assert "there are 100" in repeated.certificate.note
    assert engine.calls == []


def test_nothing_to_test_and_nothing_to_keep():
    policy, _ = run([], Engine([], []))
    assert "No policy that is faster" in policy.certificate.note
    policy, _ = run(candidates(1), Engine([], []), "accuracy", full_scores={"": {"accuracy": 0.0}})
    assert "scores 0 in accuracy" in policy.certificate.note


def test_nothing_passed_says_how_many_would_do():
    chain = candidates(2)
    policy, tests = run(chain, Engine(chain, [15, 0]))
    assert [t.accepted for t in tests] == [False]
    assert policy.is_full_depth
    assert policy.certificate.kind == "full depth"
    assert policy.certificate.evidence[0].p_value > 0.05
    needed = math.ceil(1.5 * 2 * math.log(20) * 0.015 * 0.985 / 0.005**2)
    assert f"about {needed} clusters would have been needed" in policy.certificate.note
    policy, _ = run(chain, Engine(chain, [30, 0]))
    assert "no number of clusters would do" in policy.certificate.note
    assert ExitPolicy.from_json(policy.to_json()) == policy


def test_other_samples_than_full_depth_are_refused():
    chain = candidates(1)
    engine = Engine(chain, [0])

    def loses_one(policy):
        found = engine(policy)
        return found if policy.is_full_depth else Decoded(IDS[1:], IDS[1:], {"accuracy": FULL[1:]}, found.same[1:])

    with pytest.raises(ValueError, match="must be decoded on the samples of full depth; 1 differ, such as 's00000'"):
        run(chain, loses_one)
    with pytest.raises(ValueError, match="`confidence_level` must lie"):
        run(chain, engine, confidence_level=1)


def test_consistency_needs_no_scores():
    chain = candidates(1)
    engine = Engine(chain, [1])
    policy, _ = run(chain, lambda p: replace(engine(p), scores={}))
    assert policy.certificate.kind == "certified"
    assert policy.certificate.evidence[0].score is None
    assert ExitPolicy.from_json(policy.to_json()) == policy


def test_uncertified_is_marked():
    policy = uncertified(candidates(2)[1], [Promise("accuracy", 0.98)], 0.95)
    assert policy.certificate.kind == "uncertified"
    assert "no promise" in policy.certificate.in_words()
