import pytest
from pycocoevalcap.rouge.rouge import Rouge
from torchmetrics.functional.text import rouge_score

from lightning_mue.metrics import AnswerScore, score
from lightning_mue.metrics.rouge import rouge_l
from tests.metrics.captions import corpus, for_coco


@pytest.mark.parametrize("seed", range(5))
def test_equals_coco(seed):
    predictions, references = corpus(seed)
    mean, scores = Rouge().compute_score(*for_coco(predictions, references))
    assert [rouge_l(p, refs) for p, refs in zip(predictions, references, strict=True)] == pytest.approx(
        scores.tolist(), abs=1e-12
    )
    metric = AnswerScore("rouge_l")
    metric.update(predictions, references)
    assert metric.compute().item() == pytest.approx(mean, abs=1e-9)


@pytest.mark.parametrize("texts", [("", [""]), ("", ["a"]), ("a", [""]), ("a", ["", "a b"])])
def test_empty_texts_as_coco(texts):
    assert rouge_l(*texts) == pytest.approx(Rouge().calc_score([texts[0]], texts[1]), abs=1e-12)


def test_by_hand():
    # The longest common subsequence of "a c d" and "a b c d e" is "a c d": precision 1, recall 3/5.
    assert rouge_l("a c d", ["a b c d e"]) == pytest.approx(2.44 * 0.6 / (0.6 + 1.44))


def test_torchmetrics_differs_where_the_docstring_says():
    """Where this fails torchmetrics has COCO's convention, and ours can go."""
    prediction, references = "a dog runs fast", ["a dog", "a dog runs fast today near the sea"]
    theirs = rouge_score(prediction, [references], accumulate="best", rouge_keys="rougeL")["rougeL_fmeasure"].item()
    assert theirs != pytest.approx(rouge_l(prediction, references), abs=1e-2)


def test_score_tokenises():
    assert score("rouge_l", "A dog, running.", ["a dog running"]) == pytest.approx(1)
    with pytest.raises(ValueError, match="at least one text"):
        rouge_l("a", [])
