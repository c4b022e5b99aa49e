"""The benchmarks of CoCa: the loop without a cache, and what the tables divide and check."""

from dataclasses import replace
from types import SimpleNamespace

import coca_cost
import numpy as np
import pytest
import torch
from coca_captions import CALIBRATED, FIRST, UNCACHED, Captions, captions
from coca_case import make_case, random_model, share_right
from coca_uncached import uncached_captions

from lightning_mue.backbones import view
from lightning_mue.benchmark.exam import Exam
from lightning_mue.benchmark.lines import Times
from lightning_mue.inference import ExitEngine
from lightning_mue.inference.compare import Timing
from lightning_mue.metrics import scorer
from lightning_mue.policy import ExitPolicy, ExitRule
from tests import zoo
from tests.test_side_by_side import text

PLAIN = zoo.tiny_coca().config.to_diff_dict() | {"model_type": "open_clip_coca"}


class Said:
    """Made-up data whose references are given."""

    processor = SimpleNamespace(decode=lambda sequences: [text(row) for row in sequences])

    def __init__(self, references):
        names = [str(i) for i in range(len(references))]
        self.names = {"sample_id": names, "cluster": names, "references": [[said] for said in references]}

    def answer_constraint(self, end_id):
        return None


@pytest.fixture
def case(monkeypatch):
    monkeypatch.setattr(coca_cost, "ENGINES", {"torch fp32": ("torch", None)})
    return make_case(random_model(PLAIN, 0), batch=2, steps=6, seed=0)


@pytest.mark.parametrize("steps", [3, 12])
def test_the_loop_says_what_generate_does(steps):
    model, tensors = zoo.shared("coca"), zoo.inputs("coca", 6)
    said = view(model).generate(tensors, max_new_tokens=12)
    end = int(said[0, 4])  # ends the first caption in the middle, and others or none
    ended = view(model).generate(tensors, max_new_tokens=steps, eos_token_id=end)
    torch.testing.assert_close(
        uncached_captions(model.coca, tensors["pixel_values"], zoo.START, [end], steps), ended[:, : steps + 1]
    )
    never = uncached_captions(model.coca, tensors["pixel_values"], zoo.START, (), 12)
    assert never.shape == (6, 13)


def test_every_line_of_the_cost_table_says_what_open_clip_does_at_its_depths(case):
    found = coca_cost.measure(case, repeats=1, seed=0)
    assert list(found) == [
        *(f"no cache, torch {precision}" for precision in ("fp32", "bf16")),
        *(f"torch fp32 {which}" for which in ("full", "static", "ragged", "first")),
    ]
    assert found["torch fp32 full"].answer.tokens == found[coca_cost.BASELINE].answer.tokens
    assert len({str(found[f"torch fp32 {which}"].answer.tokens) for which in ("full", "static", "first")}) == 3
    limits = coca_cost.limits(case)
    assert limits["limit fp32 first"].ms < limits["limit fp32 static"].ms < limits["limit fp32 full"].ms


def test_a_line_that_says_something_else_is_refused(case):
    answer = coca_cost.lines(case)["torch fp32 ragged"][1]()
    coca_cost.check(case, "torch fp32 ragged", "ragged", answer)
    assert share_right(case, case.schedules["full"], torch.tensor(answer.tokens)) < 1
    tokens = [[*row[:-1], row[-1] % 90 + 3] for row in answer.tokens]
    with pytest.raises(ValueError, match="must choose what open_clip's modules do for 100% of tokens, got 83"):
        coca_cost.check(case, "torch fp32 ragged", "ragged", replace(answer, tokens=tokens))
    with pytest.raises(ValueError, match="must leave at the depths of 'full', left at others"):
        coca_cost.check(case, "torch fp32 ragged", "full", answer)


def test_captions_are_those_of_the_policy_and_of_plain_generate():
    model, policy = zoo.shared("coca"), ExitPolicy({"vision": ExitRule.static(2), "decoder": ExitRule.static(4)})
    batch = zoo.inputs("coca", 4)
    plain = [text(row) for row in view(model).generate(batch)[:, 1:]]
    early = [text(row) for row in ExitEngine(model, policy).generate(**batch).sequences[:, 1:]]
    data = Said(plain)
    exam = Exam(model, data, [batch | data.names], scorer("exact_match", None))
    found = captions(exam, policy, None, (1, 2), samples=2, repeats=1)
    assert found.answers[UNCACHED].texts == found.answers[found.full].texts == plain
    assert found.answers[CALIBRATED].texts == early
    assert found.kept == pytest.approx(np.mean([a == b for a, b in zip(early, plain, strict=True)]))
    assert list(found.times[2]) == [
        UNCACHED,
        found.full,
        *(f"static decoder depth {k}" for k in (3, 4, 5)),
        FIRST,
        CALIBRATED,
    ]
    assert {name: times.ms.shape for name, times in found.times[1].items()} == dict.fromkeys(found.times[1], (1, 2))


def test_captions_divide_totals_of_a_round():
    def times(*rounds):
        return Times(Timing(0, 0, 0, None, 1, None), np.array(rounds, dtype=float))

    of_one = {
        UNCACHED: times([50, 70], [80, 40]),
        "full": times([10, 20], [20, 20]),
        CALIBRATED: times([5, 10], [20, 10]),
        FIRST: times([4, 6], [10, 10]),
    }
    found = Captions("full", {}, {1: of_one})
    assert found.faster(1, CALIBRATED, UNCACHED).tolist() == [8, 4]
    assert found.share(1).tolist() == [15 / 20, 10 / 20]
