"""What the benchmarks compare with: the depths of an oracle, and how sure a share is."""

import numpy as np
import pytest
import torch
from papers.bounds import interval, oracle_depths

from lightning_mue.backbones import view
from tests import reference, zoo
from tests.invariants.test_decoder_prompt import BACKBONES, LENGTHS, ROWS, alone, prompted

STEPS = 6


CLOSED = torch.tensor([11, 12, 13])
"""So few tokens that the exits of a random model often agree."""


class Closed:
    """Data with these answers alone."""

    def answer_constraint(self, end_id):
        return lambda _row, _ids: CLOSED.tolist()


@pytest.mark.parametrize("name", BACKBONES)
def test_an_oracle_leaves_at_the_first_exit_that_says_the_last_layers_token(name):
    model, tensors = zoo.make(name), prompted(name)
    model.generation_config.max_new_tokens = STEPS
    layers, last = zoo.exit_layers(name)["decoder"], view(model).decoder.num_layers
    (found,) = oracle_depths(model, [tensors], Closed(), layers)
    for row in range(ROWS):
        one, given = alone(tensors, row)
        del one["decoder_prompt"]
        settings = {"prefix_allowed_tokens_fn": lambda _row, _ids: CLOSED.tolist()}
        whole = reference.generate(model, one, decoder_input_ids=given, **settings)
        states, _ = reference.decoder_states(model, one, whole[:, :-1])
        logits = {k: reference.exit_logits(model, k, states[k])[0, LENGTHS[row] :] for k in layers}
        said = {k: CLOSED[at[:, CLOSED].argmax(-1)] for k, at in logits.items()}
        tokens = whole[0, given.shape[1] :]
        expected = [next((k for k in layers if said[k][t] == token), last) for t, token in enumerate(tokens)]
        assert found[row] == expected
    assert len({depth for row in found for depth in row}) > 1


def test_an_interval_covers_the_share_as_often_as_it_says():
    """Clusters of four samples that fall together; 95 % within the error of 300 draws."""
    rng, covered = np.random.default_rng(1), 0
    for _ in range(300):
        full = rng.random(60) < 0.8
        keeps = rng.random(60) < 0.9
        pair = np.repeat([full, full & keeps], 4, axis=1).astype(float)
        low, high = interval(pair[1], pair[0], [f"c{k // 4}" for k in range(240)], draws=400)
        covered += low <= 0.9 <= high
    assert 0.90 <= covered / 300 <= 0.985


def test_without_any_change_the_interval_is_a_point():
    scores = torch.rand(40).numpy()
    assert interval(scores, scores, [str(k) for k in range(40)]) == (1.0, 1.0)
