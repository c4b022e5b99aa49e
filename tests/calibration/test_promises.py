"""Drops, caps, several promises and groups at once; and what too few samples get instead of a certificate."""

import numpy as np
import pytest
from scipy.stats import bootstrap

from lightning_mue.calibration import Decoded, certify, groups_large_enough, propose, worth_decoding
from lightning_mue.calibration.bootstrap import kept_interval
from lightning_mue.calibration.candidates import Candidate, Judge
from lightning_mue.calibration.clusters import cluster_means
from lightning_mue.policy import ExitPolicy, ExitRule
from lightning_mue.promise import Promise

SAME = np.ones(1, dtype=bool)


def test_a_drop_is_the_difference_in_the_metrics_own_units():
    promise = Promise("cider", drop=0.05)
    full, score = np.array([1.2, 0.3, 10.0]), np.array([0.7, 0.8, 0.0])
    assert promise.losses(score, full, SAME) == pytest.approx((full - score) / 10)
    assert promise.tolerance == pytest.approx(0.005)
    assert promise.least(1.2) == pytest.approx(1.15)
    assert promise.losses(np.zeros(1), np.full(1, 10.0), SAME) == 1.0  # the largest loss there is
    assert "loses at most 0.05 of the full-depth cider" in promise.in_words()


def test_a_cap_counts_no_score_for_more():
    full, score = np.array([3.0, 8.0]), np.array([5.0, 4.0])
    capped = Promise("cider", keep=0.9, cap=4.0).losses(score, full, SAME)
    assert capped == pytest.approx(
        Promise("cider", keep=0.9, cap=4.0).losses(score.clip(max=4), full.clip(max=4), SAME)
    )
    assert capped == pytest.approx((0.9 * np.array([3.0, 4.0]) - 4.0) / 4 / 0.9)
    assert "cider (capped at 4)" in Promise("cider", keep=0.9, cap=4.0).in_words()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"metric": "accuracy"}, "either `keep` or `drop`, got keep=None, drop=None"),
        ({"metric": "accuracy", "keep": 0.9, "drop": 0.1}, "either `keep` or `drop`, got keep=0.9, drop=0.1"),
        ({"metric": "accuracy", "drop": 1.0}, r"`drop` must lie in \(0, 1\), in units of 'accuracy', got 1"),
        ({"metric": "cider", "keep": 0.9, "cap": 11}, r"`cap` must lie in \(0, 10\] for 'cider', got 11"),
        ({"metric": "consistency", "drop": 0.1}, "'consistency' takes `keep`, and no `drop` or `cap`"),
        ({"metric": "F2", "keep": 0.9}, r"`metric` must be one of .*, got 'F2'"),
    ],
)
def test_promises_that_cannot_be_meant(given, message):
    with pytest.raises(ValueError, match=message):
        Promise(**given)


N = 2000
NAMES = [f"s{i:05d}" for i in range(N)]
GROUPS = ["often" if i % 4 else "rare" for i in range(N)]  # 1,500 and 500
FULL = (np.arange(N) % 10 < 8).astype(float)
CHAIN = [
    Candidate(ExitPolicy({"decoder": ExitRule.static(k)}, fingerprint="abc"), 0.1, float(k), {"accuracy": 0.8}, 1.0, {})
    for k in (3, 2, 1)
]


def decoder(wrong, changed=None):
    """Decode so that the link with static depth k gets the samples in ``wrong[k]`` wrong and changes more."""

    def decode(policy):
        k = policy.rules["decoder"].layers[0] if policy.rules else 0
        score, same = FULL.copy(), np.ones(N, dtype=bool)
        score[list(wrong.get(k, ()))] = 0.0
        same[list(wrong.get(k, ()))] = False
        same[list((changed or {}).get(k, ()))] = False
        return Decoded(NAMES, NAMES, {"accuracy": score, "anls": score}, same, GROUPS)

    return decode


def run(decode, promises, **options):
    scores = {group: {"accuracy": 0.8, "anls": 0.8} for group in ("", "often", "rare")}
    defaults = {"confidence_level": 0.95, "seed": 0, "clusters": NAMES, "full_scores": scores}
    return certify(CHAIN, decode, promises=promises, **(defaults | options))


def test_all_of_several_promises_must_pass():
    both = [Promise("accuracy", keep=0.95), Promise("consistency", keep=0.9)]
    decode = decoder({2: range(20), 1: range(40)}, {1: range(500)})  # depth 1 keeps the one and breaks the other
    alone, _ = run(decode, both[:1])
    assert alone.rules["decoder"] == ExitRule.static(1)
    policy, tests = run(decode, both)
    assert policy.rules["decoder"] == ExitRule.static(2)
    assert [test.accepted for test in tests] == [True, True, False]
    for test in tests:
        assert test.result.p == max(e.p_value for e in test.evidence)
        assert [e.promise for e in test.evidence] == both
    words = policy.certificate.in_words()
    assert "does all of this on new data" in words
    assert "at least 95.0% of the full-depth accuracy" in words
    assert "output on at least 90.0% of inputs" in words
    assert ExitPolicy.from_json(policy.to_json()) == policy


def test_a_promise_kept_over_all_may_be_broken_in_a_group():
    wrong = [i for i in range(N) if GROUPS[i] == "rare" and FULL[i]][:80]  # a fifth of the rare ones, 5 % of all
    decode, promise = decoder(dict.fromkeys((1, 2, 3), wrong)), [Promise("accuracy", keep=0.9)]
    assert run(decode, promise)[0].rules
    policy, tests = run(decode, promise, groups=["often", "rare"], group_of=GROUPS)
    assert policy.is_full_depth
    assert {e.group: e.p_value <= 0.05 for e in tests[0].evidence} == {"often": True, "rare": False}
    assert "in group 'rare'" in policy.certificate.note
    of_rare = next(e for e in tests[0].evidence if e.group == "rare")
    assert (of_rare.n, of_rare.score_full_depth) == (500, FULL[::4].mean())


def test_groups_that_are_too_small_are_not_promised_for():
    promise, scores = [Promise("consistency", keep=0.99)], {"often": {}, "rare": {}}
    sizes = {"often": 298 + 1, "rare": 298}  # 299 are needed, says the table of the calibration notes
    names = [f"{g}{i}" for g, n in sizes.items() for i in range(n)]
    groups = [g for g, n in sizes.items() for _ in range(n)]
    assert groups_large_enough(promise, 0.95, scores, names, groups) == ("often",)
    assert groups_large_enough(promise, 0.95, {"rare": {}}, names, groups) == ()  # nothing known of the other
    twice = [name.replace("rare", "often") for name in names]  # as many samples, of half as many pictures
    assert groups_large_enough(promise, 0.95, scores, twice, ["often"] * len(names)) == ()


def test_a_search_looks_at_the_tightest_promise_and_group(make_trace, latency):
    trace = make_trace(n=600)
    trace.groups = ["easy" if i % 3 else "hard" for i in range(600)]
    trace.full_score["anls"] = np.full(600, 0.5)
    for stream in trace.streams.values():
        stream.score_at["anls"] = np.where(stream.same_at, 0.5, 0.4)
    promises = [Promise("accuracy", keep=0.9), Promise("anls", drop=0.01)]
    proposal = propose(trace, latency, promises, ["easy", "hard"])
    assert proposal.groups == ("easy", "hard")
    assert all(c.policy.groups == ("easy", "hard") for c in proposal.chain)
    of = np.array(trace.groups)
    single = [Judge(trace.select(of == g), [p]) for p in promises for g in ("easy", "hard")]
    masks = [of == g for _ in promises for g in ("easy", "hard")]
    rng = np.random.default_rng(0)
    score = {"accuracy": trace.full_score["accuracy"] * (rng.random(600) < 0.97), "anls": np.full(600, 0.497)}
    same = rng.random(600) < 0.9
    alone = [j.used({m: s[k] for m, s in score.items()}, same[k]) for j, k in zip(single, masks, strict=True)]
    assert Judge(trace, promises, ["easy", "hard"]).used(score, same) == pytest.approx(max(alone))
    only = propose(trace, latency, promises, ["easy"])
    assert bytes_of(only) == bytes_of(propose(trace.select(of == "easy"), latency, promises, ["easy"]))


def bytes_of(proposal):
    return [(c.policy.to_json(), c.used, c.ms) for c in proposal.chain]


FEW = {"clusters": NAMES[:60], "full_scores": {"": {"accuracy": 0.8}}}


def few(wrong):
    plain = decoder(wrong)

    def decode(policy):
        found = plain(policy)
        scores = {metric: values[:60] for metric, values in found.scores.items()}
        return Decoded(NAMES[:60], NAMES[:60], scores, found.same[:60])

    return decode


def test_too_few_samples_get_an_estimate_and_no_promise():
    promise = [Promise("accuracy", keep=0.98)]
    policy, tests = run(few({2: [], 1: range(5)}), promise, **FEW)
    assert [test.accepted for test in tests] == [True, True, False]  # 5 of 48 right answers are more than 2 %
    assert policy.rules["decoder"] == ExitRule.static(2)
    assert policy.certificate.kind == "estimate"
    words = policy.certificate.in_words()
    said = (
        "An estimate on the samples that chose this policy, no promise: accuracy: 100.0% kept (no interval; 60 samples"
    )
    assert words.startswith(said)  # drawing identical outputs again would say nothing
    assert "needs at least" in words  # what a certificate would take
    assert "With 95% confidence" not in words
    assert ExitPolicy.from_json(policy.to_json()) == policy
    nothing, tests = run(few({3: range(5)}), promise, **FEW)
    assert nothing.is_full_depth
    assert nothing.certificate.kind == "full depth"
    refused, tests = run(few({}), promise, estimate=False, **FEW)
    assert (refused.is_full_depth, tests) == (True, [])
    assert not worth_decoding(promise, 0.95, FEW["clusters"], FEW["full_scores"], estimate=False)
    assert worth_decoding(promise, 0.95, FEW["clusters"], FEW["full_scores"])


def test_a_model_that_scores_nothing_is_not_even_estimated():
    nothing = {"clusters": NAMES[:60], "full_scores": {"": {"accuracy": 0.0}}}
    policy, tests = run(few({}), [Promise("accuracy", keep=0.98)], **nothing)
    assert (policy.is_full_depth, tests) == (True, [])
    assert not worth_decoding([Promise("accuracy", keep=0.98)], 0.95, NAMES[:60], {"": {"accuracy": 0.0}})


def test_the_interval_is_that_of_scipys_bootstrap():
    rng = np.random.default_rng(3)
    full = rng.random(300)
    score = full * rng.uniform(0.8, 1.1, 300)
    clusters = [f"c{i // 3:03d}" for i in range(300)]
    ours, theirs = cluster_means(score, clusters), cluster_means(full, clusters)

    def ratio(a, b, axis=-1):
        return a.mean(axis) / b.mean(axis)

    found = bootstrap((ours, theirs), ratio, paired=True, n_resamples=5000, method="percentile", rng=1, axis=-1)
    assert kept_interval("accuracy", score, full, clusters, 0.95, 0) == pytest.approx(
        found.confidence_interval, abs=0.003
    )


def test_what_a_cap_does_not_count_is_in_no_number():
    names = NAMES[:400]
    full = Decoded(names, names, {"cider": np.full(400, 5.0)}, np.ones(400, dtype=bool))
    found = Decoded(names, names, {"cider": np.full(400, 2.0)}, np.zeros(400, dtype=bool))
    promise = [Promise("cider", keep=0.9, cap=2.0)]
    how = {"clusters": names, "full_scores": {"": {"cider": 2.0}}}
    policy, _ = run(lambda p: found if p.rules else full, promise, **how)
    (evidence,) = policy.certificate.evidence
    assert (evidence.score, evidence.score_full_depth, evidence.kept) == (2.0, 2.0, 1.0)


def test_each_group_is_measured_by_its_own_full_depth():
    """A group that scores well needs few samples, whatever the mean over all groups is."""
    promise = [Promise("accuracy", keep=0.9)]
    sizes, scores = {"good": 44, "bad": 366}, {"good": {"accuracy": 0.9}, "bad": {"accuracy": 0.3}}
    groups = [g for g, n in sizes.items() for _ in range(n)]
    names = [f"{g}{i}" for i, g in enumerate(groups)]
    assert groups_large_enough(promise, 0.95, scores, names, groups) == ("bad", "good")
    assert worth_decoding(promise, 0.95, names, scores, ["bad", "good"], groups, estimate=False)


def test_few_or_equal_clusters_have_no_interval():
    rng = np.random.default_rng(0)
    names, full = [f"c{i}" for i in range(60)], np.ones(60)
    assert kept_interval("accuracy", full, full, names, 0.95, 0) is None
    assert kept_interval("accuracy", rng.random(29), full[:29], names[:29], 0.95, 0) is None
    assert kept_interval("accuracy", rng.random(60), full, names, 0.95, 0) is not None
