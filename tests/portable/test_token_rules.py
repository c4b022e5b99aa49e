"""Rules over arrays do what transformers' processors do."""

import itertools

import numpy as np
import pytest
import torch

from lightning_mue.backbones.generation import build_processors
from lightning_mue.backbones.stream import DecodeSettings
from lightning_mue.portable.token_rules import token_rules

VOCABULARY, STEPS = 13, 6
PROMPTS = {"plain": [[2]] * 3, "prompts": [[2, 5, 6, 5, 6], [2, 5], [2, 7, 7, 7, 7, 7]]}


def closed(row, ids):
    return [3, 4 + (row + int(ids.sum())) % 5]


def settings(ngram, first, last):
    plain = {"no_repeat_ngram_size": ngram, "forced_bos_token_id": first, "forced_eos_token_id": last}
    return DecodeSettings(2, (3,), 0, STEPS, plain)


@pytest.mark.parametrize("prompts", PROMPTS)
@pytest.mark.parametrize("ngram", [0, 1, 2, 3])
@pytest.mark.parametrize("last", [None, 3, [3, 9]])
def test_they_are_those_of_transformers(prompts, ngram, last):
    chance = np.random.default_rng(0)
    for first, allowed, length in itertools.product((None, 8), (None, closed), range(1, STEPS + 6)):
        asked = settings(ngram, first, last)
        ids = chance.integers(4, 8, (2, length))
        logits = chance.standard_normal((2, VOCABULARY)).astype(np.float32)
        rows, expected, found = [2, 0], torch.from_numpy(logits.copy()), logits.copy()
        if allowed is not None and length < max(len(PROMPTS[prompts][row]) for row in rows):
            continue  # a constraint is asked about answers alone
        for processor in build_processors(asked, allowed, PROMPTS[prompts]):
            expected = processor(torch.from_numpy(ids), expected, rows)
        for rule in token_rules(asked.plain, STEPS, allowed, PROMPTS[prompts]):
            found = rule(ids, found, rows)
        assert np.array_equal(found, expected.numpy()), (first, allowed, length)


def test_a_constraint_must_allow_something():
    (rule,) = token_rules(settings(0, None, None).plain, STEPS, lambda _row, _ids: [], [[2]])
    with pytest.raises(ValueError, match=r"must allow a token, got none for row 0 after \[2 5\]"):
        rule(np.array([[2, 5]]), np.zeros((1, VOCABULARY), np.float32), [0])
