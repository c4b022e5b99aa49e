"""Promises of a metric of the whole corpus: BLEU, tested by drawing pictures again, and called approximate."""

from dataclasses import replace

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu as CocoBleu
from scipy.stats import bootstrap

from lightning_mue.calibration import Decoded, certify, samples_needed
from lightning_mue.calibration.bootstrap import kept_interval, score_of
from lightning_mue.calibration.budget import kept_bound
from lightning_mue.calibration.candidates import Candidate
from lightning_mue.calibration.losses import p_value
from lightning_mue.calibration.watch import Watch
from lightning_mue.corpus import sentence_bleu
from lightning_mue.metrics.bleu import bleu_counts
from lightning_mue.policy import ExitPolicy, ExitRule
from lightning_mue.promise import Promise
from tests.metrics.captions import for_coco

WORDS = [f"w{i}" for i in range(12)]
CHAIN = [
    Candidate(ExitPolicy({"decoder": ExitRule.static(k)}, fingerprint="abc"), 0.1, float(k), {"bleu": 0.5}, 1.0, {})
    for k in (2, 1)
]


def captions(seed, n, changed=0.0):
    """Return answers of full depth, answers of which a share lost a word, and references."""
    rng = np.random.default_rng(seed)
    references = [list(rng.choice(WORDS, rng.integers(6, 10))) for _ in range(n)]
    full = [[w if rng.random() < 0.9 else "x" for w in words] for words in references]
    ours = [[*words[:-2], "y", words[-1]] if rng.random() < changed else words for words in full]
    return [" ".join(words) for words in full], [" ".join(words) for words in ours], [[" ".join(w)] for w in references]


def counted(answers, references):
    return np.array([bleu_counts(a, refs) for a, refs in zip(answers, references, strict=True)], np.float64)


def world(seed, n, changed):
    full, ours, references = captions(seed, n, changed)
    return counted(full, references), counted(ours, references), [f"{i:04d}" for i in range(n)]


def test_the_score_is_cocos_and_the_interval_scipys():
    full, ours, references = captions(0, 100, 0.4)
    expected, _ = CocoBleu(4).compute_score(*for_coco(ours, references), verbose=0)
    names = [f"{i:04d}" for i in range(100)]
    counts, full_counts = counted(ours, references), counted(full, references)
    assert score_of("bleu", counts, names) == pytest.approx(expected[3], abs=1e-9)

    def kept(index):
        found, _ = CocoBleu(4).compute_score(*for_coco([ours[i] for i in index], [references[i] for i in index]), 0)
        best, _ = CocoBleu(4).compute_score(*for_coco([full[i] for i in index], [references[i] for i in index]), 0)
        return found[3] / best[3]

    expected = bootstrap((np.arange(100),), kept, vectorized=False, n_resamples=400, method="percentile", rng=1)
    found = kept_interval("bleu", counts, full_counts, names, 0.95, 0)
    assert found == pytest.approx(tuple(expected.confidence_interval), abs=0.01)
    assert found[1] - found[0] > 0.02


def test_samples_of_a_cluster_are_drawn_together():
    full, ours, names = world(1, 60, 0.5)
    twice = [np.concatenate([of, of]) for of in (ours, full)]
    alone = p_value(Promise("bleu", keep=0.92), ours, full, np.zeros(60, bool), names, 0.95, 0)
    together = p_value(Promise("bleu", keep=0.92), *twice, np.zeros(120, bool), names * 2, 0.95, 0)
    assert (together.p, together.clusters, together.n) == (alone.p, 60, 120)
    assert 0.001 < alone.p < 0.999


def test_at_the_boundary_it_errs_about_as_often_as_it_says():
    full, ours, _ = world(2, 20_000, 0.3)  # the source
    keep = score_of("bleu", ours, range(20_000)) / score_of("bleu", full, range(20_000))
    rng, passed, runs = np.random.default_rng(0), 0, 200
    for _ in range(runs):
        drawn = rng.integers(0, 20_000, 400)
        result = p_value(Promise("bleu", keep=keep), ours[drawn], full[drawn], np.zeros(400, bool), range(400), 0.95, 0)
        passed += result.p <= 0.05
    assert 0.015 < passed / runs < 0.09


def test_the_certificate_says_that_it_is_approximate():
    full, ours, names = world(3, 500, 0.05)
    worse = world(3, 500, 1.0)[1]
    same = (ours == full).all(1)

    def decode(policy):
        k = policy.rules["decoder"].layers[0] if policy.rules else 0
        counts, unchanged = {0: (full, same | True), 2: (ours, same), 1: (worse, same & False)}[k]
        return Decoded(names, names, {}, unchanged, counts={"bleu": counts})

    promise = Promise("bleu", keep=0.97)
    how = {"confidence_level": 0.95, "seed": 0, "clusters": names, "full_scores": {"": {"bleu": 0.6}}}
    policy, tests = certify(CHAIN, decode, promises=[promise], **how)
    assert [test.accepted for test in tests] == [True, False]
    certificate = policy.certificate
    assert certificate.kind == "approximate"
    assert certificate.evidence[0].score == pytest.approx(score_of("bleu", ours, names))
    assert certificate.evidence[0].method == "paired bootstrap of clusters"
    assert certificate.in_words().startswith("Approximately")
    assert ExitPolicy.from_json(policy.to_json()) == policy
    both = [promise, Promise("consistency", keep=0.9)]
    assert certify(CHAIN, decode, promises=both, **how)[0].certificate.kind == "approximate"
    assert certify(CHAIN, decode, promises=both[1:], **how)[0].certificate.kind == "certified"


def test_identical_outputs_on_few_samples_prove_nothing():
    promise = Promise("bleu", keep=0.98)
    assert samples_needed(promise, 0.95) == samples_needed(Promise("consistency", keep=0.98), 0.95) == 149
    full, _, names = world(4, 148, 0.0)

    def decode(policy):
        return Decoded(names, names, {}, np.ones(148, bool), counts={"bleu": full})

    how = {"confidence_level": 0.95, "seed": 0, "clusters": names, "full_scores": {"": {"bleu": 0.6}}}
    policy, _ = certify(CHAIN, decode, promises=[promise], **how)
    assert policy.certificate.kind == "estimate"
    assert "needs at least 149 clusters" in policy.certificate.note


def test_within_a_budget_the_bound_is_a_quantile_of_what_is_kept():
    full, ours, names = world(5, 200, 0.2)
    bound = kept_bound(Promise("bleu", keep=0.9), ours, full, np.zeros(200, bool), names, 0.95, 0)
    low, _ = kept_interval("bleu", ours, full, names, 0.90, 0)
    assert bound == pytest.approx(low, abs=0.0015)


def test_a_caption_alone_scores_little_more_than_nothing_only_if_nothing_is_right():
    assert sentence_bleu(bleu_counts("a b c d", ["a b c d"])) == pytest.approx(1.0)
    assert 0 < sentence_bleu(bleu_counts("a b x y", ["a b c d"])) < 1
    assert sentence_bleu(bleu_counts("", ["a b"])) == 0
    assert sentence_bleu(bleu_counts("x y", ["a b"])) < 1e-3


def test_what_cannot_be_asked_of_a_corpus():
    with pytest.raises(ValueError, match="no mean over samples"):
        Promise("bleu", keep=0.9, cap=0.5)
    with pytest.raises(ValueError, match="no single request"):
        Watch(Promise("bleu", keep=0.9))
    assert replace(Promise("bleu", keep=0.9), keep=None, drop=0.02).tolerance == 0.02
