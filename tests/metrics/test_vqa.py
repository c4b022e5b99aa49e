import random
from itertools import combinations

import pytest

from lightning_mue.metrics import score
from lightning_mue.metrics.vqa import normalise_vqa, vqa_accuracy


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("  Red\nBall ", "red ball"),
        ("The cat and a dog", "cat and dog"),
        ("two", "2"),
        ("Ten o'clock.", "10 o'clock"),
        ("None", "0"),
        ("dont", "don't"),
        ("it doesnt, shouldntve", "it doesn't shouldn't've"),
        ("couldn'tve oclock", "couldn't've o'clock"),
        ("girl's girls", "girl's girls"),
        ("ill well were its", "ill well were its"),
        ("2:50 p.m.", "2:50 pm"),
        ("100,978", "100978"),
        ("1,000,000 red, blue", "1000000 red blue"),
        ("5.5 m. 7. .5", "5.5 m 7 .5"),
        ("black/white (t-shirt)?", "black white t shirt"),
        ("$5 50% #1", "$5 50% #1"),
        ("A", "a"),
        ("?!", "?!"),
        ("", ""),
    ],
)
def test_normalise(answer, expected):
    assert normalise_vqa(answer) == expected
    assert normalise_vqa(expected) == expected


@pytest.mark.parametrize(("agree", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_ten_people(agree, expected):
    people = ["yes"] * agree + ["no"] * (10 - agree)
    assert vqa_accuracy("Yes.", people) == pytest.approx(expected)


def leave_one_out(answer, people):
    subsets = list(combinations(people, len(people) - 1))
    return sum(min(sum(p == answer for p in subset) / 3, 1) for subset in subsets) / len(subsets)


def test_equals_brute_force():
    draw = random.Random(0)
    for _ in range(300):
        people = [draw.choice(["red", "blue", "green"]) for _ in range(draw.randint(4, 12))]
        assert vqa_accuracy("red", people) == pytest.approx(leave_one_out("red", people))


@pytest.mark.parametrize(
    ("people", "expected"),
    [
        (["a dog"], 1),
        (["cat"], 0),
        (["dog", "dog"], 1),
        (["dog", "cat"], 1 / 2),
        (["dog"] * 3, 1),
        (["dog", "dog", "cat"], 2 / 3),  # left are dog+cat, dog+cat, dog+dog: (1/2 + 1/2 + 1) / 3
        (["dog", "cat", "cow"], 1 / 3),
    ],
)
def test_few_people(people, expected):
    assert score("vqa_accuracy", "Dog", people) == pytest.approx(expected)


def test_both_sides_are_normalised():
    assert vqa_accuracy("2", ["two"] * 10) == 1
    assert vqa_accuracy("cat", ["The cat."] * 3 + ["dog"] * 7) == pytest.approx(0.9)
    with pytest.raises(ValueError, match="at least one text"):
        vqa_accuracy("a", [])
