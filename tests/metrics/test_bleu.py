import numpy as np
import pytest
import torch
from pycocoevalcap.bleu.bleu import Bleu as CocoBleu
from torchmetrics import MetricCollection
from torchmetrics.functional.text import bleu_score

from lightning_mue.metrics import Bleu
from lightning_mue.metrics.bleu import bleu_counts, bleu_scores
from tests.metrics.captions import corpus, for_coco

pytestmark = pytest.mark.filterwarnings("ignore:The ``compute`` method")


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("edges", [True, False])
def test_equals_coco(seed, edges):
    predictions, references = corpus(seed, edges=edges)
    of_corpus, of_samples = CocoBleu(4).compute_score(*for_coco(predictions, references), verbose=0)
    scores = [bleu_scores(bleu_counts(p, refs)) for p, refs in zip(predictions, references, strict=True)]
    assert np.array(scores) == pytest.approx(np.array(of_samples).T, abs=1e-9)
    for n in (1, 2, 3, 4):
        metric = Bleu(n, tokenise=str)
        metric.update(predictions, references)
        assert metric.compute().item() == pytest.approx(of_corpus[n - 1], abs=1e-9)
        assert metric.compute().dtype == torch.float64
    assert 0.1 < of_corpus[3] < of_corpus[0] < 1


def test_nothing_right_is_nearly_zero_and_nothing_said_is_zero():
    for prediction in ("x y z", ""):
        expected, _ = CocoBleu(4).compute_score({0: ["a b c d"]}, {0: [prediction]}, verbose=0)
        assert bleu_scores(bleu_counts(prediction, ["a b c d"])) == pytest.approx(expected, abs=1e-12)


def test_torchmetrics_differs_where_the_docstring_says():
    """Where this fails torchmetrics has COCO's convention, and ours can go."""
    tied = ["a b c d e f", "a b c d"]
    ours = bleu_scores(bleu_counts("a b c d e", tied))[3]
    assert bleu_score(["a b c d e"], [tied[::-1]]).item() == pytest.approx(ours, abs=1e-6)
    assert bleu_score(["a b c d e"], [tied]).item() != pytest.approx(ours, abs=1e-2)
    assert bleu_score(["a b x"], [["a b c"]]).item() == 0
    assert bleu_scores(bleu_counts("a b x", ["a b c"]))[3] > 1e-6


def test_orders_in_one_collection():
    predictions, references = corpus(2)
    together = MetricCollection({f"bleu_{n}": Bleu(n) for n in (1, 2, 3, 4)})
    for p, refs in zip(predictions, references, strict=True):
        together.update([p], [refs])
    expected, _ = CocoBleu(4).compute_score(*for_coco(predictions, references), verbose=0)
    assert [together.compute()[f"bleu_{n}"].item() for n in (1, 2, 3, 4)] == pytest.approx(expected, abs=1e-9)


def test_raw_captions_are_tokenised():
    metric = Bleu(2)
    metric.update(["The Dog's toy."], [["the dog 's toy"]])
    assert metric.compute().item() == pytest.approx(1, abs=1e-6)


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"`n` must be one of \[1, 2, 3, 4\], got 5"):
        Bleu(5)
    with pytest.raises(ValueError, match="1 predictions for 2"):
        Bleu().update(["a"], [["a"], ["b"]])
    assert Bleu().compute().isnan()
