import pytest
import torch
from torchmetrics import MetricCollection

from lightning_mue.corpus import CORPUS
from lightning_mue.metrics.answers import AnswerScore, normalise, score, scorer
from lightning_mue.promise import METRICS, OF_EMBEDDINGS


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


@pytest.mark.parametrize(
    ("prediction", "expected"), [("NO.53  A,", 1), ("NO.53 A,", 1), ("no.53 A,", 0), ("NO.53 A", 0), ("", 0)]
)
def test_exact_text_forgives_white_space_alone(prediction, expected):
    assert score("exact_text", prediction, ["TOTAL", "NO.53 A,"]) == expected


def test_normalise():
    assert normalise("  ( A red , CIRCLE )  ") == "a red , circle"


@pytest.mark.parametrize("metric", sorted({*METRICS} - {"consistency", "cider", *CORPUS, *OF_EMBEDDINGS}))
def test_what_can_be_promised_can_be_scored_in_0_to_1(metric):
    texts = ["red", "", "a red ball", "The red ball .", "blue", "5", "red red red red red red"]
    scores = [score(metric, a, [b, c]) for a in texts for b in texts for c in texts]
    assert all(type(value) is float and 0 <= value <= 1 for value in scores)
    assert score(metric, "a red ball", ["a red ball"]) == pytest.approx(1)
    assert score(metric, "blue", ["xyz w"]) == 0
    assert scorer(metric)("a", ["a"]) == score(metric, "a", ["a"])


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"`metric` must be one of \['accuracy', 'anls', .*, got 'cider2'"):
        score("cider2", "a", ["a"])
    with pytest.raises(ValueError, match=r"'cider' needs `frequencies`.*DocumentFrequencies\.from_references"):
        score("cider", "a", ["a"])
    with pytest.raises(ValueError, match="'cider' needs `frequencies`"):
        AnswerScore("cider")
    for metric in ("accuracy", "vqa_accuracy", "anls", "character_accuracy", "rouge_l"):
        for references in ([], "a"):
            with pytest.raises(ValueError, match="references"):
                score(metric, "a", references)
    with pytest.raises(ValueError, match="metric"):
        AnswerScore("f1")


def test_answer_score_is_the_mean_over_all_updates():
    metric = AnswerScore("accuracy")
    metric.update(["yes", "no"], [["yes"], ["yes"]])
    metric.update(["maybe"], [["maybe", "yes"]])
    assert metric.compute() == pytest.approx(2 / 3)
    assert metric.compute().dtype == torch.float64
    metric.reset()
    metric.update(["x"], [["y"]])
    assert metric.compute() == 0
    with pytest.raises(ValueError, match="1 predictions for 2"):
        metric.update(["x"], [["y"], ["z"]])


def test_two_scores_in_one_collection():
    """Nothing is right in the first batch; torchmetrics must not take the two for one."""
    scores = MetricCollection({name: AnswerScore(name) for name in ("exact_match", "anls")})
    scores.update(["x"], [["hello"]])
    scores.update(["helo"], [["hello"]])
    found = scores.compute()
    assert found["exact_match"] == 0
    assert found["anls"] == pytest.approx(0.8 / 2)


def test_forward_gives_the_batch_and_keeps_the_whole():
    metric = AnswerScore()
    assert metric(["a"], [["a"]]) == 1
    assert metric(["a"], [["b"]]) == 0
    assert metric.compute() == 0.5
