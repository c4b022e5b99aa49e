import random
from functools import cache

import pytest
from torchmetrics.functional.text import char_error_rate
from torchmetrics.functional.text import edit_distance as beam_edit_distance

from lightning_mue.metrics.edits import anls, character_accuracy, edit_distance


@cache
def brute_force(a, b):
    if not a or not b:
        return len(a) + len(b)
    return min(brute_force(a[1:], b) + 1, brute_force(a, b[1:]) + 1, brute_force(a[1:], b[1:]) + (a[0] != b[0]))


def test_edit_distance_equals_brute_force():
    draw = random.Random(0)
    for _ in range(500):
        a, b = ("".join(draw.choice("abé🙂 ") for _ in range(draw.randint(0, 9))) for _ in range(2))
        assert edit_distance(a, b) == brute_force(a, b)


def test_edit_distance_of_shifted_texts():
    """Where the last line fails torchmetrics' edit distance is exact, and ours can go."""
    word, fill = "abcdefghijklmnopqrstuvwxyz0123456789ABCDEFGHIJ", "x" * 40
    assert edit_distance(word + fill, fill + word) == 80
    assert beam_edit_distance([word + fill], [fill + word]).item() > 80


def test_character_accuracy_is_one_less_the_error_rate_of_torchmetrics():
    draw = random.Random(1)
    for _ in range(200):
        a, b = ("".join(draw.choice("abC ") for _ in range(draw.randint(1, 30))) for _ in range(2))
        expected = max(0.0, 1 - char_error_rate([a], [b]).item())
        assert character_accuracy(a, [b]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("TOTAL 9.00", ["TOTAL 9.00"], 1),
        ("TOTAL 9.80", ["TOTAL 9.00"], 0.9),
        ("total", ["TOTAL"], 0),
        ("", ["abc"], 0),
        ("", [""], 1),
        ("a", [""], 0),
        ("aaaaaaaa", ["a"], 0),
        ("abcd", ["xxxx", "abcx", "ab"], 0.75),
    ],
)
def test_character_accuracy(prediction, references, expected):
    assert character_accuracy(prediction, references) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("Hello  World", ["hello world"], 1),
        ("helo world", ["Hello World"], 10 / 11),
        ("abxx", ["abcd"], 0.5),  # at the threshold: counted
        ("abxxx", ["abcde"], 0),  # 2 of 5 are right: below
        ("abcdefgh", ["abcd"], 0.5),  # the longer text is the measure
        ("", ["a"], 0),
        ("", [""], 1),
        ("12.50", ["nothing", "12,50"], 0.8),
    ],
)
def test_anls(prediction, references, expected):
    assert anls(prediction, references) == pytest.approx(expected)


@pytest.mark.parametrize("rule", [anls, character_accuracy])
def test_no_reference(rule):
    with pytest.raises(ValueError, match="at least one text"):
        rule("a", [])
    with pytest.raises(ValueError, match="at least one text"):
        rule("a", "a")
