"""The drift watch: against plain sums and products, at the boundary, after a change, and over restarts."""

import json
import math

import numpy as np
import pytest

from lightning_mue.calibration.audits import Audits
from lightning_mue.calibration.watch import Watch, lowest_loss, promised, watch_all
from lightning_mue.certificate import Certificate, Evidence
from lightning_mue.promise import Promise

PROMISES = [
    Promise("consistency", keep=0.75),
    Promise("accuracy", keep=0.9),
    Promise("cider", keep=0.9, cap=4.0),
    Promise("anls", drop=0.05),
]
BETS = [2.0**-k for k in range(1, 11)]


def kept_back(t):
    return 1 / (1 + math.log(t))


def evidence(losses, tolerance, lower):
    """The definition: of every start and every bet the product of its factors, and what was not staked."""
    total = kept_back(len(losses) + 1)
    for start in range(1, len(losses) + 1):
        stake = kept_back(start) - kept_back(start + 1)
        for bet in BETS:
            factors = [1 + bet * (loss - tolerance) / (tolerance - lower) for loss in losses[start - 1 :]]
            total += stake * math.prod(factors) / len(BETS)
    return total


def outcomes(promise, n, seed=0):
    """Random scores, scores at full depth and equalities."""
    rng = np.random.default_rng(seed)
    high = 10.0 if promise.metric == "cider" else 1.0
    return rng.random(n) * high, rng.random(n) * high, rng.random(n) < 0.6


def wrong(failures):
    """Audits of consistency: 1 where the output was not the same."""
    return np.zeros(len(failures)), np.zeros(len(failures)), ~np.asarray(failures, dtype=bool)


@pytest.mark.parametrize("promise", PROMISES, ids=lambda p: p.in_words())
def test_evidence_is_that_of_all_starts_and_bets(promise):
    arrays = outcomes(promise, 40)
    watch, losses, peak = Watch(promise), promise.losses(*arrays).tolist(), 1.0
    lower = {"consistency": 0.0, "accuracy": -1 / 0.9, "cider": -1 / 0.9, "anls": -1.0}[promise.metric]
    for t in range(40):
        watch.observe(*(a[t : t + 1] for a in arrays))
        peak = max(peak, evidence(losses[: t + 1], promise.tolerance, lower))
        assert watch.p_value == pytest.approx(1 / peak, rel=1e-9)
    assert (watch.audits, watch.mean_loss) == (40, pytest.approx(np.mean(losses)))
    at_once = Watch(promise)
    assert at_once.observe(*arrays) == watch.alarm
    assert at_once.p_value == watch.p_value < 1


@pytest.mark.parametrize("promise", PROMISES, ids=lambda p: p.in_words())
def test_no_loss_lies_below_the_bound(promise):
    high = 10.0 if promise.metric == "cider" else 1.0
    scores, full = (grid.ravel() for grid in np.meshgrid(*2 * [np.linspace(0, high, 41)]))
    losses = np.concatenate([promise.losses(scores, full, np.full(len(scores), same)) for same in (True, False)])
    assert losses.min() == pytest.approx(lowest_loss(promise), abs=1e-12)


@pytest.mark.parametrize("promise", PROMISES, ids=lambda p: p.in_words())
def test_wealth_outlives_any_losses(promise):
    best = np.full(3000, promise.highest), np.zeros(3000), np.ones(3000, dtype=bool)
    worst = np.zeros(3000), np.full(3000, promise.highest), np.zeros(3000, dtype=bool)
    watch = Watch(promise)
    assert not watch.observe(*best)
    assert watch.p_value == 1  # all is well: no evidence was ever more than there was at first
    assert np.isfinite(watch.log_wealth).all()
    assert watch.observe(*worst)
    assert np.isfinite(watch.log_wealth).all()
    assert watch.observe(*best), "an alarm stays"


def test_expected_evidence_is_one_at_the_boundary():  # all 2^10 sequences, exactly
    promise, n = Promise("consistency", keep=0.75), 10
    mean, alarms = 0.0, 0.0
    for code in range(2**n):
        failures = [(code >> i) & 1 for i in range(n)]
        watch = Watch(promise, 0.8)
        chance = math.prod(0.25 if failed else 0.75 for failed in failures)
        alarms += chance * watch.observe(*wrong(failures))
        mean += chance * evidence(failures, 0.25, 0.0)
    assert mean == pytest.approx(1, rel=1e-9)
    assert 0 < alarms <= 0.2


def boundary(promise, rng, n):
    """Audits whose mean loss is just the tolerance."""
    if promise.metric == "consistency":
        return wrong(rng.random(n) < promise.tolerance)
    full = (rng.random(n) < 0.7).astype(float)
    if promise.keep is not None:
        return full * promise.highest * (rng.random(n) < promise.keep), full * promise.highest, full > 0
    drops, gains = rng.random(n) < 0.05 + 2 * promise.drop, rng.random(n) < 0.05
    return 0.5 + 0.5 * gains - 0.5 * drops, np.full(n, 0.5), full > 0


BOUNDARY = [Promise("consistency", keep=0.95), Promise("accuracy", keep=0.95), Promise("anls", drop=0.025)]


@pytest.mark.parametrize("promise", BOUNDARY, ids=lambda p: p.in_words())
def test_false_alarms_are_rare_however_long_one_looks(promise):
    runs, n, level = 150, 800, 0.8
    rng = np.random.default_rng(1)
    alarms = np.mean([Watch(promise, level).observe(*boundary(promise, rng, n)) for _ in range(runs)])
    assert alarms <= 1 - level  # the alarm stays, so this is one look after every audit


def audits_to_alarm(watch, draw, most):
    before = watch.audits
    while not watch.alarm and watch.audits - before < most:
        watch.observe(*draw())
    return watch.audits - before


@pytest.mark.parametrize(
    ("before", "after", "most"), [(0, 0.04, 2000), (0, 0.5, 20), (4000, 0.04, 4000), (4000, 0.1, 400)]
)
def test_a_broken_promise_is_noticed_also_after_long_good_times(before, after, most):
    rng, found = np.random.default_rng(before), []
    for _ in range(20):  # allowed are 2 % of other outputs; at first there are 1 %
        watch = Watch(Promise("consistency", keep=0.98))
        assert not watch.observe(*wrong(rng.random(before) < 0.01))
        found.append(audits_to_alarm(watch, lambda: wrong(rng.random(1) < after), 2 * most))
    assert np.quantile(found, 0.9) <= most


def test_a_single_start_would_have_to_win_back_what_it_lost():
    failures = np.r_[np.zeros(4000), np.tile([1.0, *[0.0] * 9], 100)]  # none, and then every tenth
    watch = Watch(Promise("consistency", keep=0.98))
    assert watch.observe(*wrong(failures))
    one_start = [math.fsum(np.log1p(bet * (failures - 0.02) / 0.02)) for bet in BETS]
    assert np.logaddexp.reduce(one_start) - math.log(len(BETS)) < 0


def test_a_gain_of_some_requests_pays_for_losses_of_others():
    promise, rng = Promise("accuracy", keep=0.95), np.random.default_rng(0)
    watch = Watch(promise)
    for _ in range(2000):
        full = (rng.random(1) < 0.7).astype(float)
        watch.observe(np.abs(full - (rng.random(1) < 0.05)), full, full > 0)  # 3.5 % lost and 1.5 % won: 97.1 % kept
    assert not watch.alarm
    assert watch.mean_loss < 0
    rng = np.random.default_rng(0)

    def lost():  # 90 % kept
        full = (rng.random(1) < 0.7).astype(float)
        return full * (rng.random(1) < 0.9), full, full > 0

    assert audits_to_alarm(watch, lost, 3000) < 3000


def test_what_is_certified_is_watched_with_one_confidence():
    promises = PROMISES[:2]
    evidence = tuple(Evidence(promise, group) for promise in promises for group in ("chart", "photo"))
    subjects = promised(Certificate("certified", evidence, 0.9))
    assert subjects == [(promise, group) for promise in promises for group in ("chart", "photo")]
    watches = watch_all(subjects, 0.95)
    assert [watch.subject for watch in watches] == [(p, g, pytest.approx(1 - 0.05 / 4)) for p, g in subjects]
    for kind in ("uncertified", "full depth", "estimate"):
        with pytest.raises(ValueError, match="Nothing is promised, so there is nothing to watch"):
            promised(Certificate(kind, evidence, 0.9))
    with pytest.raises(ValueError, match=r"no certificate\); calibrate, or give `promises`"):
        promised(None)
    with pytest.raises(ValueError, match=r"`confidence_level` must lie in \(0, 1\), such as 0.95, got 95"):
        watch_all(subjects, 95)


def test_words_say_what_was_found():
    watch = Watch(Promise("consistency", keep=0.98), 0.95, "chart")
    assert watch.in_words() == (
        "Nothing was audited yet to tell that this policy gives the full-depth output on at least 98.0% of inputs in "
        "group 'chart'."
    )
    watch.observe(*wrong([0] * 49 + [1]))
    assert watch.in_words().startswith("No alarm: nothing refutes that this policy gives")
    assert "(50 audits, mean loss 0.0200, allowed 0.0200; p = " in watch.in_words()
    watch.observe(*wrong([1] * 20))
    assert watch.in_words().startswith("ALARM: it no longer holds that")
    assert watch.in_words().endswith("alarm at 0.05).")


def audited(audits, requests, seed):
    """Let requests come, of which the group is that of their number, and observe those that are drawn."""
    rng = np.random.default_rng(seed)
    scores, full, same = outcomes(Promise("accuracy", keep=0.9), requests, rng.integers(1 << 30))
    rows = audits.draw(requests)
    groups = [("chart", "photo")[i % 2] for i in rows]
    audits.observe(same[rows], {"accuracy": (scores[rows], full[rows])}, groups)
    return rows


def some_audits(level=0.95, seed=5):
    subjects = [(PROMISES[0], ""), (PROMISES[0], "chart"), (PROMISES[1], "photo")]
    return Audits(watch_all(subjects, level), 0.3, seed)


def test_a_restart_changes_nothing(tmp_path):
    without, file = some_audits(), tmp_path / "deep" / "watch.json"
    expected = [audited(without, 50, seed) for seed in range(20)]
    audits = some_audits()
    for seed in range(20):
        assert audited(audits, 50, seed) == expected[seed]
        audits.save(file, "policy")
        audits = some_audits(seed=99)  # the seed of the file goes on
        audits.restore(file, "policy")
    assert [watch.to_dict() for watch in audits.watches] == [watch.to_dict() for watch in without.watches]
    assert audits.watches[0].audits == sum(map(len, expected))
    assert json.loads(file.read_text())["watches"][0]["audits"] == audits.watches[0].audits
    assert [path.name for path in file.parent.iterdir()] == ["watch.json"]


def test_draws_have_the_share_and_groups_their_own_audits():
    audits = some_audits()
    rows = [row for seed in range(200) for row in audited(audits, 50, seed)]
    assert len(rows) / 10_000 == pytest.approx(0.3, abs=5 * math.sqrt(0.21 / 10_000))
    assert np.bincount(rows, minlength=50).min() > 0
    both, chart, photo = audits.watches
    assert both.audits == len(rows)
    assert chart.audits == sum(row % 2 == 0 for row in rows)
    assert photo.audits == sum(row % 2 == 1 for row in rows)
    assert (audits.metrics, audits.has_groups) == (["accuracy"], True)
    assert audits.alarm == any(watch.alarm for watch in audits.watches)
    assert audits.in_words().count("\n") == 2


def test_files_of_other_watches_are_refused(tmp_path):
    file = tmp_path / "watch.json"
    some_audits().save(file, "policy")
    for audits, policy in (
        (some_audits(), "another"),
        (some_audits(0.9), "policy"),
        (Audits(watch_all([(PROMISES[1], "")], 0.95), 0.3), "policy"),
    ):
        with pytest.raises(ValueError, match=r"watch.json watches another policy, other promises or at another level"):
            audits.restore(file, policy)
    good = json.loads(file.read_text())
    broken = [good | {"schema": 0}, good | {"random": {}}, good | {"watches": [{}]}, {}, [], None]
    broken.append(good | {"watches": [good["watches"][0] | {"log_wealth": [0.0]}]})
    for data in broken:
        file.write_text(json.dumps(data))
        with pytest.raises(ValueError, match=r"must be the state of a watch: .* Remove it to begin anew"):
            some_audits().restore(file, "policy")
    file.write_text("{")
    with pytest.raises(ValueError, match="must be the state of a watch"):
        some_audits().restore(file, "policy")


def test_nothing_to_watch_and_no_share_are_refused():
    with pytest.raises(ValueError, match="nothing to watch; name at least one promise"):
        Audits([], 0.1)
    for share in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"`share` must lie in \(0, 1\]"):
            Audits([Watch(PROMISES[0])], share)
    assert Audits([Watch(PROMISES[0])], 1).draw(3) == [0, 1, 2]
