"""Timings on a clock of our own: nothing here depends on the machine."""

import pytest
import torch

from lightning_mue.inference import ExitEngine
from lightning_mue.inference.compare import compare, engine_variant, transformers_variant
from lightning_mue.policy import ExitPolicy
from tests import reference, zoo


class Clock:
    """Stands still but for what the variants add."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def __call__(self):
        return self.now

    def variant(self, name, seconds):
        def answer(sample):
            self.calls.append((name, sample["i"]))
            self.now += seconds(sample["i"], len(self.calls)) if callable(seconds) else seconds
            return torch.zeros(1, 1)

        return answer


def samples(n):
    return [{"i": i} for i in range(n)]


def test_numbers_and_ratios():
    clock = Clock()
    variants = {"plain": clock.variant("plain", lambda i, _: (i + 1) / 100), "fast": clock.variant("fast", 0.01)}
    found = compare(variants, samples(5), repeats=2, warmup=0, clock=clock)
    plain, fast = found["plain"], found["fast"]
    assert (plain.p50_ms, plain.mean_ms, plain.ratio) == pytest.approx((30, 30, 1))
    assert plain.p95_ms == pytest.approx(48)
    assert (fast.p50_ms, fast.p95_ms, fast.mean_ms) == pytest.approx((10, 10, 10))
    assert fast.ratio == pytest.approx(1 / 3)  # the median of 1, 1/2, 1/3, 1/4, 1/5: paired, not a ratio of means
    assert (fast.spread_ms, fast.ratio_spread) == pytest.approx((0, 0))


def test_ratios_refer_to_the_named_baseline():
    clock = Clock()
    variants = {"plain": clock.variant("plain", 0.02), "fast": clock.variant("fast", 0.01)}
    found = compare(variants, samples(2), warmup=0, baseline="fast", clock=clock)
    assert found["plain"].ratio == pytest.approx(2)
    assert found["fast"].ratio == pytest.approx(1)


def test_spread_is_over_repeats():
    clock = Clock()
    slower = {"a": clock.variant("a", lambda _, calls: 0.01 if calls <= 3 else 0.02 if calls <= 6 else 0.05)}
    found = compare(slower, samples(3), repeats=3, warmup=0, clock=clock)["a"]
    assert found.p50_ms == pytest.approx(20)
    assert found.spread_ms == pytest.approx(20)  # quartiles of 10, 20, 50: 15 and 35
    one = compare({"a": clock.variant("a", 0.01)}, samples(3), repeats=1, clock=clock)["a"]
    assert one.spread_ms is None
    assert one.ratio_spread is None


def test_variants_take_turns_and_each_begins_as_often():
    clock = Clock()
    variants = {name: clock.variant(name, 0.01) for name in "abc"}
    done = []
    compare(variants, samples(3), repeats=3, warmup=2, on_done=lambda *at: done.append(at), clock=clock)
    warm, timed = clock.calls[:6], clock.calls[6:]
    assert sorted(warm) == [(name, i) for name in "abc" for i in range(2)]
    rounds = [timed[at : at + 3] for at in range(0, len(timed), 3)]
    assert all(len({i for _, i in turn}) == 1 and {n for n, _ in turn} == set("abc") for turn in rounds)
    for i in range(3):  # a sample meets every order
        assert sorted(turn[0][0] for turn in rounds if turn[0][1] == i) == list("abc")
    assert done == [(k, 9) for k in range(1, 10)]


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="needs variants, samples and repeats, got 0, 1 and 3"):
        compare({}, samples(1))
    with pytest.raises(ValueError, match="got 1, 0 and 3"):
        compare({"a": lambda _: torch.zeros(1)}, [])
    with pytest.raises(ValueError, match=r"one of \['a'\], got 'b'"):
        compare({"a": lambda _: torch.zeros(1)}, samples(1), baseline="b")


@pytest.mark.parametrize("name", list(zoo.BACKBONES))
def test_both_variants_answer_alike_at_full_depth(name):
    model = zoo.shared(name)
    tensors = zoo.inputs(name, 1)
    inputs = tensors | {"labels": torch.zeros(1, 3)}  # what generate does not read is left out
    theirs, ours = (
        transformers_variant(model, 7),
        engine_variant(ExitEngine(model, ExitPolicy.full_depth()), 7),
    )
    expected = reference.generate(model, tensors, max_new_tokens=7).tolist()
    assert theirs(inputs).tolist() == ours(inputs).tolist() == expected
    found = compare({"transformers": theirs, "engine": ours}, [inputs], repeats=1)
    assert list(found) == ["transformers", "engine"]
