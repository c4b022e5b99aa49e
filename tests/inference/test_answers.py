"""Closed answer sets: the best answer by likelihood, as the backbone itself scores them."""

import pytest
import torch

from lightning_mue.inference import ExitEngine
from lightning_mue.inference.answers import only_answers
from lightning_mue.policy import ExitPolicy
from tests import reference, zoo
from tests.promises import certificate


@pytest.mark.parametrize("name", list(zoo.BACKBONES))
def test_single_token_answers_are_the_most_likely_ones(name):
    model = zoo.make(name, seed=2)
    tensors = zoo.inputs(name, 6)
    answers = [[11], [23], [42]]
    constraint = only_answers(answers, zoo.END)
    found = ExitEngine(model, ExitPolicy.full_depth()).generate(**tensors, prefix_allowed_tokens_fn=constraint)
    scores = []
    for (token,) in answers:  # OFA's way: the likelihood of every candidate, end token included
        labels = torch.tensor([[token, zoo.END]]).expand(6, -1)
        start = torch.tensor([[zoo.START, token]]).expand(6, -1)
        _, logits = reference.decoder_states(model, tensors, start)
        scores.append(logits.log_softmax(-1).gather(2, labels[:, :, None])[:, 0, 0])
    best = torch.stack(scores).argmax(0)
    assert found.sequences[:, 1].tolist() == [answers[i][0] for i in best]
    assert set(found.sequences[:, 2].tolist()) == {zoo.END}


def test_answers_of_several_tokens_follow_their_tree():
    allowed = only_answers([[5, 6], [5, 7, 8], [9]], end_id=3)
    assert allowed(0, torch.tensor([2])) == [5, 9]
    assert allowed(0, torch.tensor([2, 5])) == [6, 7]
    assert allowed(0, torch.tensor([2, 5, 7])) == [8]
    assert allowed(0, torch.tensor([2, 9])) == [3]
    with pytest.raises(ValueError, match="at least one token"):
        only_answers([[5], []], end_id=3)


class _Words:
    """A processor whose words are token ids."""

    def __init__(self, tensors):
        self.tensors = tensors

    def __call__(self, images, text):
        return self.tensors

    def labels(self, text):
        return torch.tensor([[int(word), zoo.END] for word in text])

    def decode(self, sequences):
        return [str(row[1].item()) for row in sequences]


def test_a_policy_certified_on_closed_answers_gives_no_others():
    model, tensors = zoo.make("florence2", seed=2), zoo.inputs("florence2", 5)
    free = ExitEngine(model, ExitPolicy.full_depth(), processor=_Words(tensors)).answer([None] * 5, [""] * 5)
    assert not set(free) <= {"11", "23", "42"}
    promise = certificate(decode={"answers": ["11", "23", "42"]})
    engine = ExitEngine(model, ExitPolicy(certificate=promise), processor=_Words(tensors))
    assert engine.answer([None] * 5) == engine.answer([None] * 5, [""] * 5)
    assert set(engine.answer([None] * 5)) <= {"11", "23", "42"}


@pytest.mark.parametrize("name", list(zoo.BACKBONES))
@pytest.mark.parametrize("beams", [1, 3])
def test_only_rows_of_the_answers_are_scored(name, beams, monkeypatch):
    model, tensors, answers = zoo.shared(name), zoo.inputs(name, 4), [[11], [23, 42], [23, 5, 6], [77]]
    allowed = only_answers(answers, zoo.END)
    expected = reference.generate(model, tensors, num_beams=beams, prefix_allowed_tokens_fn=allowed)
    engine, asked = ExitEngine(model, ExitPolicy.full_depth(), runtime="torch"), []
    head = type(engine.backbone.decoder).head
    monkeypatch.setattr(type(engine.backbone.decoder), "head", lambda *given: asked.append(given) or head(*given))
    found = engine.generate(**tensors, prefix_allowed_tokens_fn=allowed, num_beams=beams).sequences
    ends = [(row == zoo.END).nonzero()[0, 0] + 1 for row in expected]
    assert all(torch.equal(a[:end], b[:end]) for a, b, end in zip(found, expected, ends, strict=True))
    assert bool(asked) == (beams > 1)  # probabilities of beams are over all tokens
