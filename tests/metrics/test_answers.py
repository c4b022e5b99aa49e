import pytest
import torch

from lightning_mue.metrics.answers import AnswerScore, normalise, score


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("red", ["red"], 1),
        (" Red. ", ["red"], 1),
        ("a  red\tcircle", ["no", "A red circle!"], 1),
        ("red", ["red circle"], 0),
        ("", ["red"], 0),
        ("25/12/2018", ["25/12/2018"], 1),
        ("25122018", ["25/12/2018"], 0),
        ("...", ["!!!"], 0),
        ("...", ["..."], 1),
        ('"yes"', ["Yes"], 1),
        ("", [""], 1),
    ],
)
@pytest.mark.parametrize("metric", ["exact_match", "accuracy"])
def test_score(metric, prediction, references, expected):
    result = score(metric, prediction, references)
    assert result == expected
    assert isinstance(result, float)


def test_normalise():
    assert normalise("  ( A red , CIRCLE )  ") == "a red , circle"


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"`metric` must be one of \['accuracy', 'exact_match'\], got 'cider2'"):
        score("cider2", "a", ["a"])
    with pytest.raises(ValueError, match="references"):
        score("accuracy", "a", [])
    with pytest.raises(ValueError, match="references"):
        score("accuracy", "a", "a")
    with pytest.raises(ValueError, match="metric"):
        AnswerScore("f1")


def test_answer_score_is_the_mean_over_all_updates():
    metric = AnswerScore("accuracy")
    metric.update(["yes", "no"], [["yes"], ["yes"]])
    metric.update(["maybe"], [["maybe", "yes"]])
    assert metric.compute() == pytest.approx(2 / 3)
    metric.reset()
    metric.update(["x"], [["y"]])
    assert metric.compute() == 0
    with pytest.raises(ValueError, match="1 predictions for 2"):
        metric.update(["x"], [["y"], ["z"]])


def test_states_add_up_over_ranks():
    first, second = AnswerScore(), AnswerScore()
    first.update(["a", "b"], [["a"], ["b"]])
    second.update(["c"], [["d"]])
    joined = torch.stack([first.total, second.total]).sum() / (first.count + second.count)
    assert first._reductions["total"](torch.stack([first.total, second.total])) == 2
    assert joined == pytest.approx(2 / 3)
