"""An engine watched in service, against transformers' own answers and the engine's without a watch."""

import json

import numpy as np
import pytest
import torch

from lightning_mue.calibration.watch import Watch
from lightning_mue.certificate import Certificate, Evidence
from lightning_mue.inference import ExitEngine
from lightning_mue.inference.watched import WatchedEngine
from lightning_mue.metrics import scorer
from lightning_mue.policy import ExitPolicy
from lightning_mue.promise import Promise
from tests import reference, zoo
from tests.invariants.policies import decoder_rule, encoder_rules

SAME = Promise("consistency", keep=0.9)
STEPS = 6
NAMES = [str(row) for row in range(12)]


class Words:
    """A processor whose pictures are rows of ``tensors``, whose prompts name them, and whose words are token ids."""

    def __init__(self, tensors):
        self.tensors = tensors

    def __call__(self, images, text):
        rows = [int(word) for word in text]
        return {k: v[list(images) if k == "pixel_values" else rows] for k, v in self.tensors.items()}

    def decoder_prompts(self, text):
        return torch.tensor([[20 + int(word)] for word in text])

    def decode(self, sequences):
        return [" ".join(str(t) for t in row if t > zoo.END) for row in sequences.tolist()]


def certified(*evidence, **decode):
    return Certificate("certified", tuple(evidence), 0.95, decode=decode)


@pytest.fixture(scope="module")
def made():
    """A model, twelve rows, a policy under which some of their answers differ from full depth, and those answers."""
    model, tensors = zoo.shared("florence2"), zoo.inputs("florence2", 12)
    vision = encoder_rules(model, "florence2", tensors)["vision"]
    policy = ExitPolicy({"vision": vision, "decoder": decoder_rule(model, "florence2", tensors, "gate", 0.02)})
    mine = ExitEngine(model, policy).generate(STEPS, **tensors).sequences.tolist()
    full = reference.generate(model, tensors, max_new_tokens=STEPS).tolist()
    return model, tensors, policy, mine, full


def words(row):
    return " ".join(str(t) for t in row if t > zoo.END)


def spy(watched):
    """Return the numbers of rows that full depth is asked for, call by call."""
    asked, generate = [], watched._full.generate

    def counting(*args, **inputs):
        asked.append(len(inputs["input_ids"]))
        return generate(*args, **inputs)

    watched._full.generate = counting
    return asked


def drawn(seed, share):
    """Return which of twelve first requests are audited."""
    rows = np.flatnonzero(np.random.default_rng(seed).random(12) < share).tolist()
    assert rows[0] > 0, "else the first rows would do"
    return rows


def different(mine, full):
    return [words(a) != words(b) for a, b in zip(mine, full, strict=True)]


def test_every_request_audited_gives_the_mean_loss(made):
    model, tensors, policy, mine, full = made
    watched = WatchedEngine(ExitEngine(model, policy, processor=Words(tensors)), 1.0, SAME)
    found = watched.generate(STEPS, **tensors, labels=torch.zeros(1))
    assert found.sequences.tolist() == mine, "the caller is given the policy's answers"
    (watch,) = watched.audits.watches
    assert (watch.audits, watch.total_loss) == (12, sum(different(mine, full)))
    assert 0 < watch.total_loss < 12
    texts = watched.answer(range(12), NAMES, STEPS)
    assert texts == [words(row) for row in mine]
    assert (watch.audits, watch.total_loss) == (24, 2 * sum(different(mine, full)))


def test_only_rows_that_are_drawn_are_answered_again(made):
    model, tensors, policy, mine, full = made
    watched = WatchedEngine(ExitEngine(model, policy), 0.25, SAME, seed=3)
    asked, draws = spy(watched), []
    draw = watched.audits.draw
    watched.audits.draw = lambda requests: draws.append(draw(requests)) or draws[-1]
    for _ in range(30):
        assert watched.generate(STEPS, **tensors).sequences.tolist() == mine
    assert asked == [len(rows) for rows in draws if rows]
    assert any(not rows for rows in draws)
    assert sum(asked) / 360 == pytest.approx(0.25, abs=0.1)
    (watch,) = watched.audits.watches
    assert watch.total_loss == sum(different(mine, full)[row] for rows in draws for row in rows)


def test_only_answers_that_are_drawn_are_given_again(made):
    model, tensors, policy, _, _ = made
    engine = ExitEngine(model, policy, processor=Words(tensors))
    plain = ExitEngine(model, ExitPolicy.full_depth(), processor=Words(tensors))
    for first in (None, NAMES):
        mine, full = (e.answer(range(12), NAMES, STEPS, first) for e in (engine, plain))
        watched = WatchedEngine(engine, 0.4, SAME, seed=6)
        rows = drawn(6, 0.4)
        assert watched.answer(range(12), NAMES, STEPS, first) == mine
        (watch,) = watched.audits.watches
        assert (watch.audits, watch.total_loss) == (len(rows), sum(mine[row] != full[row] for row in rows))
        assert 0 < watch.total_loss < len(rows)


def test_a_constraint_follows_its_row(made):
    model, tensors, policy, _, _ = made

    def allowed(row, ids):
        return [10 + 3 * row, 11 + 3 * row, 12 + 3 * row]

    full = ExitEngine(model, ExitPolicy.full_depth()).generate(STEPS, allowed, **tensors).sequences.tolist()
    mine = ExitEngine(model, policy).generate(STEPS, allowed, **tensors).sequences.tolist()
    watched = WatchedEngine(ExitEngine(model, policy), 0.5, SAME, seed=1)
    rows = drawn(1, 0.5)
    assert watched.generate(STEPS, allowed, **tensors).sequences.tolist() == mine
    assert watched.audits.watches[0].total_loss == sum(mine[row] != full[row] for row in rows)
    assert watched.audits.watches[0].total_loss < len(rows)


def test_decoder_prompts_and_the_certified_length_hold_in_audits(made):
    model, tensors, policy, _, _ = made
    prompt_BP = torch.full((12, 4), -100)
    for row in range(12):
        prompt_BP[row, : row % 5] = 20 + row
    tensors = tensors | {"decoder_prompt": prompt_BP}
    settings = {"max_new_tokens": STEPS} | tensors
    mine = ExitEngine(model, policy).generate(**settings).sequences.tolist()
    full = ExitEngine(model, ExitPolicy.full_depth()).generate(**settings).sequences.tolist()
    certificate = certified(Evidence(SAME), max_new_tokens=STEPS)
    policy = ExitPolicy(policy.rules, certificate=certificate)
    watched = WatchedEngine(ExitEngine(model, policy), 1.0)
    assert watched.generate(**tensors).sequences.tolist() == mine
    assert watched.audits.watches[0].total_loss == sum(different(mine, full)) > 0


def test_scores_of_references_and_groups(made):
    model, tensors, policy, mine, full = made
    promise = Promise("exact_text", keep=0.9)
    evidence = Evidence(promise, "odd"), Evidence(SAME, "odd"), Evidence(SAME, "even")
    policy = ExitPolicy(policy.rules, certificate=certified(*evidence, max_new_tokens=STEPS))
    engine = ExitEngine(model, policy, processor=Words(tensors))
    groups = [("even", "odd")[row % 2] for row in range(12)]
    references = [[words(row)] for row in full[:8] + mine[8:]]
    rows = drawn(10, 0.6)
    odd, even = ([row for row in rows if row % 2 == rest] for rest in (1, 0))
    expected = Watch(promise, 1 - 0.05 / 3, "odd")
    right = [np.array([words(said[row]) == references[row][0] for row in odd], float) for said in (mine, full)]
    expected.observe(*right, np.ones(len(odd), bool))
    assert 0 < right[0].sum() < len(odd)
    for ask in (
        lambda watched: watched.generate(groups=groups, references=references, **tensors),
        lambda watched: watched.answer(range(12), NAMES, groups=groups, references=references),
    ):
        watched = WatchedEngine(engine, 0.6, scorers={"exact_text": scorer("exact_text"), "anls": None}, seed=10)
        ask(watched)
        first, *others = watched.audits.watches
        assert first.to_dict() == expected.to_dict()
        assert [watch.audits for watch in others] == [len(odd), len(even)]
        assert [watch.total_loss for watch in others] == [
            sum(different(mine, full)[row] for row in of) for of in (odd, even)
        ]
    with pytest.raises(ValueError, match="`groups` must be given for each of 12 requests, got none"):
        watched.generate(references=references, **tensors)
    with pytest.raises(ValueError, match="`references` must be given for each of 12 requests, got none"):
        watched.generate(groups=groups, **tensors)
    with pytest.raises(ValueError, match="`references` must be given for each of 12 requests, got 3"):
        watched.generate(groups=groups, references=references[:3], **tensors)
    with pytest.raises(ValueError, match="Watching 'exact_text' needs what scores an answer"):
        WatchedEngine(engine)
    with pytest.raises(ValueError, match="needs text, and this engine has no processor"):
        WatchedEngine(ExitEngine(model, policy), scorers={"exact_text": scorer("exact_text")})


def test_a_restart_goes_on_with_draws_and_evidence(made, tmp_path):
    model, tensors, policy, _, _ = made
    engine, file = ExitEngine(model, policy), tmp_path / "watch.json"
    always = WatchedEngine(engine, 0.1, SAME)
    for _ in range(15):
        always.generate(STEPS, **tensors)
        WatchedEngine(engine, 0.1, SAME, file=file).generate(STEPS, **tensors)  # every call in a process of its own
    last = WatchedEngine(engine, 0.1, SAME, file=file)
    assert last.audits.watches[0].to_dict() == always.audits.watches[0].to_dict()
    assert 0 < last.audits.watches[0].audits < 60
    assert last.audits.draw(1000) == always.audits.draw(1000)
    with pytest.raises(ValueError, match="watches another policy"):
        WatchedEngine(ExitEngine(model, ExitPolicy.full_depth()), 0.1, SAME, file=file)
    assert json.loads(file.read_text())["policy"]


def test_alarm_and_words(made):
    model, tensors, policy, _, _ = made
    watched = WatchedEngine(ExitEngine(model, policy), 1.0, [SAME, Promise("consistency", keep=0.01)])
    assert not watched.alarm
    for _ in range(4):
        watched.generate(STEPS, **tensors)
    assert watched.alarm
    first, second = watched.in_words().split("\n")
    assert first.startswith("ALARM")
    assert second.startswith("No alarm: nothing refutes that")
    whole = WatchedEngine(ExitEngine(model, ExitPolicy.full_depth()), 1.0, SAME)
    for _ in range(4):
        whole.generate(STEPS, **tensors)
    assert not whole.alarm
    assert whole.audits.watches[0].mean_loss == 0


def test_nothing_promised_is_nothing_to_watch(made):
    model, _, policy, _, _ = made
    for certificate in (
        None,
        *(Certificate(kind, (Evidence(SAME),), 0.95) for kind in ("full depth", "estimate", "uncertified")),
    ):
        engine = ExitEngine(model, ExitPolicy(policy.rules, certificate=certificate))
        with pytest.raises(ValueError, match=r"Nothing is promised, .*; calibrate, or give `promises`"):
            WatchedEngine(engine)
        WatchedEngine(engine, promises=SAME)
    with pytest.raises(ValueError, match="nothing to watch; name at least one promise"):
        WatchedEngine(ExitEngine(model, policy), promises=[])


def test_what_is_not_greedy_is_not_watched(made):
    model, tensors, policy, _, _ = made
    watched = WatchedEngine(ExitEngine(model, policy), 1.0, SAME)
    with pytest.raises(ValueError, match=r"is greedy decoding; leave \['do_sample'\] out"):
        watched.generate(STEPS, do_sample=True, **tensors)


def test_audits_run_in_the_models_own_precision():
    """A policy of lower precision is compared with the model that was promised, not with its own copy."""
    model = zoo.shared("florence2", seed=1)
    policy = ExitPolicy(precision="bfloat16")
    watched = WatchedEngine(ExitEngine(model, policy), 1.0, Promise("consistency", keep=0.9))
    assert next(watched.engine.model.parameters()).dtype == torch.bfloat16
    assert watched._full.model is model
