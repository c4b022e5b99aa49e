"""A policy of groups: rows of others run at full depth, whatever rows lie beside them."""

from dataclasses import replace

import pytest
import torch

from lightning_mue.inference import ExitEngine
from lightning_mue.policy import ExitPolicy, ExitRule
from tests import zoo

GROUPS = ["a", "b", "c", "a", "b", "c"]


@pytest.fixture(scope="module")
def case():
    model, tensors = zoo.shared("florence2", seed=1), zoo.inputs("florence2", len(GROUPS))
    policy = ExitPolicy({"vision": ExitRule.static(2), "decoder": ExitRule.static(1)}, groups=("a", "c"))
    return model, tensors, policy


@pytest.mark.parametrize("groups", [GROUPS, ["a"] * 6, ["b"] * 6])
def test_each_row_is_what_its_own_policy_gives(case, groups):
    model, tensors, policy = case
    out = ExitEngine(model, policy).generate(8, groups=groups, timings=True, **tensors)
    early = ExitEngine(model, replace(policy, groups=None)).generate(8, **tensors)
    full = ExitEngine(model, ExitPolicy.full_depth()).generate(8, **tensors)
    assert not torch.equal(early.sequences, full.sequences)
    for row, group in enumerate(groups):
        wanted = early if group in policy.groups else full
        width = wanted.sequences.shape[1]
        found = torch.nn.functional.pad(out.sequences[row], (0, 99), value=zoo.PAD)
        assert found[:width].tolist() == wanted.sequences[row].tolist()
        assert (found[width:] == zoo.PAD).all()
        assert out.exit_depths["vision"][row] == wanted.exit_depths["vision"][row]
        steps = wanted.exit_depths["decoder"].shape[1]
        depths = torch.nn.functional.pad(out.exit_depths["decoder"][row], (0, 99))
        assert depths[:steps].tolist() == wanted.exit_depths["decoder"][row].tolist()
    assert out.timings["total"] > 0


def test_constraints_keep_their_rows(case):
    model, tensors, policy = case

    def allowed(row, ids):
        return [20 + row] if len(ids) < 3 else [zoo.END]

    out = ExitEngine(model, policy).generate(8, allowed, groups=GROUPS, **tensors)
    assert out.sequences[:, 1].tolist() == [20 + row for row in range(6)]


def test_groups_must_be_said(case):
    model, tensors, policy = case
    for groups in (None, ["a"]):
        with pytest.raises(ValueError, match=r"leaves early for the groups \['a', 'c'\] alone: .* each of 6 rows, got"):
            ExitEngine(model, policy).generate(8, groups=groups, **tensors)


def test_others_run_at_full_depth_in_the_models_own_precision(case):
    model, tensors, policy = case
    engine = ExitEngine(model, replace(policy, precision="bfloat16"))
    out = engine.generate(8, groups=["b"] * 6, **tensors)
    full = ExitEngine(model, ExitPolicy.full_depth()).generate(8, **tensors)
    assert torch.equal(out.sequences, full.sequences)
    assert out.exit_depths["vision"].tolist() == full.exit_depths["vision"].tolist()


def test_what_replays_or_records_refuses_groups(case):
    model, tensors, policy = case
    with pytest.raises(ValueError, match=r"for the groups \['a', 'c'\] alone: use `generate`"):
        ExitEngine(model, policy).run(8, None, False, tensors)
