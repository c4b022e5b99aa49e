"""Side by side: every figure of the table once more by hand, one sample at a time."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lightning_mue.callbacks.batches import single
from lightning_mue.inference import ExitEngine
from lightning_mue.policy import ExitPolicy, ExitRule
from lightning_mue.side_by_side import side_by_side
from tests.promises import certificate
from tests.zoo import END, PAD, inputs, shared

KEEP = 0.7
CALIBRATED = ExitPolicy(
    {"decoder": ExitRule("confidence", (1, 2, 3, 4), (0.6,) * 4)},
    certificate=certificate("certified", "exact_match", KEEP),
)
PLAIN_ROWS = [
    "transformers, full depth",
    "engine, full depth",
    *(f"static decoder depth {k}" for k in (1, 2, 3, 4)),
    "all at first exit",
]
METHODS = [
    "MuE",
    "mue-as-published",
    "DEED",
    "MuE encoder + DEED decoder",
    "CALM",
    "FREE",
    "patience",
    "entropy",
    "gate (ours)",
]


def text(tokens):
    return " ".join(str(int(t)) for t in tokens if int(t) not in (END, PAD))


class Data:
    """Made-up data whose references are what the model says at full depth, but for one answer of each batch."""

    processor = SimpleNamespace(decode=lambda sequences: [text(row) for row in sequences])

    def __init__(self, model):
        self._engine = ExitEngine(model, ExitPolicy.full_depth())

    def _batches(self, name, seeds):
        for seed in seeds:
            batch = inputs("florence2", 4, seed)
            said = self.processor.decode(self._engine.generate(**batch).sequences[:, 1:])
            yield batch | {
                "sample_id": [f"{name}-{seed}-{row}" for row in range(4)],
                "cluster": [f"{name}-{seed}-{row // 2}" for row in range(4)],
                "references": [["never said"], *([answer] for answer in said[1:])],
                "level": [1, 1, 2, 2],
            }

    def test_dataloader(self):
        return list(self._batches("test", range(2)))

    def val_dataloader(self):
        return list(self._batches("val", range(10, 13)))

    def split_of(self, cluster):
        return "propose" if cluster.endswith("-1") else "certify"

    def answer_constraint(self, end_id):
        return None


@pytest.fixture(scope="module")
def model():
    return shared("florence2")


@pytest.fixture(scope="module")
def measured(model):
    return side_by_side(model, CALIBRATED, Data(model), "exact_match", 2, 1, progress=False, methods=True)


def answers(model, policy, batches):
    """Decode one sample at a time; return the share that is right and stream -> mean depth."""
    engine, right, depths = ExitEngine(model, policy, check_fingerprint=False), [], {}
    for batch in batches:
        for row in range(4):
            output = engine.generate(**single(batch, row))
            right.append(text(output.sequences[0, 1:]) in batch["references"][row])
            for stream, depth in output.exit_depths.items():
                depths.setdefault(stream, []).extend(depth[depth > 0].flatten().tolist())
    return np.mean(right), {stream: np.mean(depth) for stream, depth in depths.items()}


def test_rows_of_the_table(measured, model):
    assert [row.name for row in measured.rows] == [*PLAIN_ROWS, *METHODS, "calibrated exits"]
    plain = side_by_side(model, CALIBRATED, Data(model), "exact_match", 2, 1, progress=False)
    assert [row.name for row in plain.rows] == [*PLAIN_ROWS, "calibrated exits"]
    assert (plain.methods, plain.note) == ({}, "")
    kinds = {row.name: (row.kind, row.label) for row in measured.rows}
    assert kinds["transformers, full depth"] == ("full depth", "transformers")
    assert kinds["static decoder depth 3"] == ("static", "static 3")
    assert kinds["gate (ours)"] == ("other", "")


def test_every_row_is_what_its_policy_does_sample_by_sample(measured, model):
    """In batches and alone alike; MuE's published rule, which judges a whole batch as one, too."""
    rows, batches = {row.name: row for row in measured.rows}, Data(model).test_dataloader()
    static = {f"static decoder depth {k}": ExitPolicy({"decoder": ExitRule.static(k)}) for k in (1, 2, 3, 4)}
    full = {"engine, full depth": ExitPolicy.full_depth()}
    for name, policy in (full | static | measured.methods | {"calibrated exits": CALIBRATED}).items():
        quality, depths = answers(model, policy, batches)
        assert rows[name].quality == pytest.approx(quality), name
        assert rows[name].depths == pytest.approx(depths), name
    assert rows["transformers, full depth"].quality == rows["engine, full depth"].quality == 0.75
    assert rows["engine, full depth"].ratio == 1.0
    assert measured.levels.tolist() == [1, 1, 2, 2] * 2
    assert measured.depths["decoder"].shape[0] == 8


def test_mues_published_rule_judges_each_sample_alone(model):
    """In a batch it would judge all four as one: with this threshold some leave, some do not."""
    batches = Data(model).test_dataloader()
    for t in np.linspace(1, -1, 81):
        policy = ExitPolicy({"vision": ExitRule("flat_similarity", (1,), (t,))})
        engine = ExitEngine(model, policy)
        alone = [
            [int(engine.generate(1, **single(batch, row)).exit_depths["vision"]) for row in range(4)]
            for batch in batches
        ]
        if any(len(set(of_batch)) > 1 for of_batch in alone):
            break
    measured = side_by_side(model, policy, Data(model), "exact_match", 1, 1, progress=False)
    assert measured.depths["vision"].tolist() == np.concatenate(alone).tolist()
    assert len(set(engine.generate(1, **batches[0]).exit_depths["vision"].tolist())) == 1


def propose_part(model):
    data = Data(model)
    for batch in data.val_dataloader():
        rows = [row for row in range(4) if data.split_of(batch["cluster"][row]) == "propose"]
        for row in rows:
            yield single(batch, row)


def test_methods_keep_the_promise_on_the_propose_part_and_the_next_bolder_do_not(measured, model):
    from lightning_mue.methods import families

    layers = {"vision": (1, 2, 3), "encoder": (1, 2, 3), "decoder": (1, 2, 3, 4)}
    found = families(layers, {"vision": 4, "encoder": 4, "decoder": 5}, 12)
    samples = list(propose_part(model))

    def quality(policy):
        engine = ExitEngine(model, policy, check_fingerprint=False)
        said = [text(engine.generate(**sample).sequences[0, 1:]) for sample in samples]
        return np.mean([answer in sample["references"][0] for answer, sample in zip(said, samples, strict=True)])

    least = KEEP * quality(ExitPolicy.full_depth())
    notes = {row.name: row.note for row in measured.rows}
    assert least > 0
    for method, policy in measured.methods.items():
        assert quality(policy) >= least
        assert notes[method] == ("" if policy.rules else "at full depth: no setting kept 70.0%")
        rules = found[method].rules
        dials = {s: rules[s].index(policy.rules[s]) + 1 if s in policy.rules else 0 for s in rules}
        for stream, dial in dials.items():
            if dial < found[method].size:
                assert quality(found[method].policy({**dials, stream: dial + 1})) < least
    marked = [int(name[-1]) for name, note in notes.items() if note == "boldest static depth that kept 70.0%"]
    kept = {k: quality(ExitPolicy({"decoder": ExitRule.static(k)})) >= least for k in (1, 2, 3, 4)}
    assert all(kept[k] and not kept.get(k - 1, False) for k in marked)
    assert f"{KEEP:.1%} of full-depth quality on {len(samples)} samples" in measured.note


def test_own_tuning_data_may_be_given(model):
    """On it nothing is ever right, so that everything keeps the promise and every method is at its boldest."""
    wrong = [batch | {"references": [["never said"]] * 4} for batch in Data(model).val_dataloader()[:1]]
    found = side_by_side(model, CALIBRATED, Data(model), "exact_match", 1, 1, False, methods=True, tuning=wrong)
    boldest = {method: rule.thresholds[0] for method, p in found.methods.items() if (rule := p.rules["decoder"])}
    assert boldest == dict(
        zip(METHODS, [-1.0, -1.0, 0.0, 0.0, 0.0, 0.0, 2.0, 0.0, 0.0], strict=True),
    )
    assert "4 samples" in found.note


def test_what_methods_need(model):
    bare = ExitPolicy(CALIBRATED.rules)
    with pytest.raises(ValueError, match="no certificate"):
        side_by_side(model, bare, Data(model), "exact_match", 1, 1, False, methods=True)
    with pytest.raises(ValueError, match="no data to tune"):
        side_by_side(model, CALIBRATED, Data(model), "exact_match", 1, 1, False, methods=True, tuning=[])
    assert torch.is_inference_mode_enabled() is False
