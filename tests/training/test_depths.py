"""What is drawn for a step."""

import torch

from lightning_mue.training import Supervision
from lightning_mue.training.depths import Step, sample_depths, sample_step, sample_token_depths

LAYERS = {"vision": (1, 2), "encoder": (1, 2, 3), "decoder": (1,)}


def test_sampled_depths_depend_on_seed_and_step_alone():
    draws = [sample_depths(LAYERS, 0.5, 7, step) for step in range(400)]
    assert draws == [sample_depths(LAYERS, 0.5, 7, step) for step in range(400)]
    assert all("decoder" not in d for d in draws)
    share = sum("vision" in d for d in draws) / 400
    assert 0.4 < share < 0.6
    assert {d["encoder"] for d in draws if "encoder" in d} == {1, 2, 3}
    assert all(sample_depths(LAYERS, 0.0, 7, step) == {} for step in range(20))


def test_shares_are_kept_and_draws_are_independent():
    how = Supervision(early_probability=0.5, own_path=0.25, propagate=0.5, early_after=0.0, seed=3)
    steps = [sample_step(how, LAYERS, step, 0.0) for step in range(2000)]
    assert steps == [sample_step(how, LAYERS, step, 0.9) for step in range(2000)]
    own, early = [s.own_path for s in steps], [bool(s.depths) for s in steps]
    copies = [s.token_seed is not None for s in steps]
    for draws, share in ((own, 0.25), (copies, 0.5), (early, 0.75)):
        assert abs(sum(draws) / 2000 - share) < 0.04
    both = sum(a and b for a, b in zip(own, copies, strict=True)) / 2000
    assert abs(both - 0.125) < 0.03
    assert len({s.token_seed for s in steps if s.token_seed is not None}) == sum(copies)
    other = Supervision(early_probability=0.5, own_path=0.25, propagate=0.5, early_after=0.0, seed=4)
    assert steps != [sample_step(other, LAYERS, step, 0.0) for step in range(2000)]


def test_streams_are_left_as_ever_when_other_flags_are_added():
    plain, more = Supervision(early_after=0.0), Supervision(early_after=0.0, own_path=0.5, propagate=0.5)
    for step in range(100):
        assert sample_step(plain, LAYERS, step, 1.0).depths == sample_step(more, LAYERS, step, 1.0).depths


def test_nothing_is_drawn_before_its_time():
    how = Supervision(early_probability=1.0, own_path=1.0, propagate=1.0, early_after=0.5)
    assert sample_step(how, LAYERS, 10, 0.49) == Step()
    late = sample_step(how, LAYERS, 10, 0.5)
    assert late.own_path
    assert late.token_seed is not None
    assert set(late.depths) == {"vision", "encoder"}


def test_token_depths_are_equally_likely():
    depths = sample_token_depths((2, 5, 6), (100, 60), 11)
    assert depths.shape == (100, 60)
    assert torch.equal(depths, sample_token_depths((2, 5, 6), (100, 60), 11))
    assert not torch.equal(depths, sample_token_depths((2, 5, 6), (100, 60), 12))
    shares = {k: (depths == k).float().mean().item() for k in (2, 5, 6)}
    assert sum(shares.values()) == 1.0 or abs(sum(shares.values()) - 1) < 1e-6
    assert all(abs(share - 1 / 3) < 0.02 for share in shares.values())
