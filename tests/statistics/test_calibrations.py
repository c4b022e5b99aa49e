"""The calibrations drawn from real decodes: whole clusters, judged by the pool."""

from types import SimpleNamespace

import calibrations
import numpy as np
import pytest
from pool import Pool
from torch import nn

from lightning_mue.calibration import Decoded
from lightning_mue.policy import ExitPolicy, ExitRule
from lightning_mue.promise import Promise

SIZES = np.arange(400) % 5 + 1
CLUSTERS = [f"c{i:03d}" for i, size in enumerate(SIZES) for _ in range(size)]
IDS = [f"s{i:04d}" for i in range(len(CLUSTERS))]
ACCURACY = Promise("accuracy", keep=0.9)


def pool(*shares, seed=0):
    """Return full depth with 70 % right, and policies that get whole clusters wrong: so much of what is allowed."""
    rng = np.random.default_rng(seed)
    full = np.repeat(rng.permutation(400) < 280, SIZES).astype(float)
    hit = rng.permutation(np.flatnonzero([full[CLUSTERS.index(f"c{i:03d}")] for i in range(400)]))
    wrong = [np.isin(CLUSTERS, [f"c{i:03d}" for i in hit[: round(28 * share)]]) for share in (0.0, *shares)]
    return [Decoded(IDS, CLUSTERS, {"accuracy": np.where(w, 0.0, full)}, ~w) for w in wrong]


@pytest.mark.parametrize("share", [0.25, 1.0, 1.5])  # 28 of 280 clusters that full depth gets right: a tenth
def test_part_of_the_allowed_loss(share):
    full, found = pool(share)
    assert calibrations.used(ACCURACY, found, full) == pytest.approx(share)
    assert calibrations.used(ACCURACY, full, full) == 0.0


def test_draws_take_whole_clusters_with_equal_chances_and_count_copies(monkeypatch):
    marked, samples = np.arange(len(IDS)) / len(IDS), []
    decoded = [Decoded(IDS, CLUSTERS, {"accuracy": marked}, marked >= 0)] * 2
    monkeypatch.setattr(calibrations, "certified", lambda promise, sample, seed: samples.append(sample) or 0)
    calibrations.draw(decoded, ACCURACY, 300, 50)
    members = {name: [i for i, other in enumerate(CLUSTERS) if other == name] for name in set(CLUSTERS)}
    times = dict.fromkeys(members, 0)
    for full, found in samples:
        assert len(set(full.sample_ids)) == len(full.same)
        assert (full.sample_ids, full.clusters) == (found.sample_ids, found.clusters)
        rows, copies = np.rint(found.scores["accuracy"] * len(IDS)).astype(int), {}
        for copy, row in zip(found.clusters, rows.tolist(), strict=True):
            copies.setdefault(copy, []).append(row)
        assert len(copies) == 300
        for drawn in copies.values():
            assert drawn == members[CLUSTERS[drawn[0]]]
            times[CLUSTERS[drawn[0]]] += 1
    expected = 300 * 50 / 400  # whatever the cluster's size
    for alike in range(5):
        mean = np.mean([times[f"c{i:03d}"] for i in range(alike, 400, 5)])
        assert mean == pytest.approx(expected, abs=4 * np.sqrt(expected / 80))


def test_a_policy_that_only_just_breaks_the_promise_is_certified_as_often_as_the_level_allows():
    decoded = pool(0.2, 1.04)  # 29 clusters where 28 are allowed
    drawn = calibrations.draw(decoded, ACCURACY, 300, 200)
    assert (drawn.ours == 2).mean() <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 200)
    assert (drawn.ours == 1).mean() > 0.8
    assert (drawn.usual == 2).mean() > 0.3


class Task(SimpleNamespace):
    """Two batches of four samples; every other picture proposes."""

    def __init__(self):
        names = [f"s{i}" for i in range(8)]
        batches = [{"sample_id": names[k : k + 4], "cluster": [f"p{i // 2}" for i in range(k, k + 4)]} for k in (0, 4)]
        data = SimpleNamespace(split_of=lambda cluster: "propose" if cluster in ("p1", "p3") else "certify")
        super().__init__(model=nn.Linear(2, 2), metric="accuracy", tuning=batches, data=data, decoded=[])

    def rehearsed(self, policy):
        self.decoded.append(policy)
        return Decoded([], [], {"accuracy": np.arange(8) / 8}, np.arange(8) % 2 == 0)


def test_a_pool_is_decoded_once_for_each_policy_and_the_next_run_finds_it(tmp_path):
    task, rule = Task(), ExitPolicy({"decoder": ExitRule.static(1)})
    full, again = Pool(task, tmp_path)(ExitPolicy.full_depth()), Pool(task, tmp_path)(ExitPolicy.full_depth())
    assert full.scores["accuracy"].tolist() == again.scores["accuracy"].tolist() == (np.arange(8) / 8).tolist()
    assert full.same.dtype == bool
    Pool(task, tmp_path)(rule)
    assert task.decoded == [ExitPolicy.full_depth(), rule]
    task.tuning[0]["sample_id"][0] = "another"
    Pool(task, tmp_path)(rule)
    assert len(task.decoded) == 3


def test_a_pools_parts_are_those_of_a_calibration(tmp_path):
    pool = Pool(Task(), tmp_path)
    proposes, rest = (pool.part(rows)(ExitPolicy.full_depth()) for rows in (pool.proposes, ~pool.proposes))
    assert proposes.sample_ids == ["s2", "s3", "s6", "s7"]
    assert rest.clusters == ["p0", "p0", "p2", "p2"]
    assert rest.scores["accuracy"].tolist() == [0 / 8, 1 / 8, 4 / 8, 5 / 8]
    assert rest.same.tolist() == [True, False, True, False]
