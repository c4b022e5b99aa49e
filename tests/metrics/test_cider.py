import json

import pytest
import torch
from pycocoevalcap.cider.cider import Cider as CocoCider
from pycocoevalcap.cider.cider_scorer import CiderScorer, cook_refs, cook_test

from lightning_mue.metrics import AnswerScore, Cider, DocumentFrequencies, scorer, tokenise_caption
from lightning_mue.metrics.cider import cider_d, corpus_cider_d
from tests.metrics.captions import corpus, for_coco

pytestmark = pytest.mark.filterwarnings("ignore:The ``compute`` method")


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("edges", [True, False])
def test_equals_coco(seed, edges):
    predictions, references = corpus(seed, edges=edges)
    mean, scores = CocoCider().compute_score(*for_coco(predictions, references))
    assert corpus_cider_d(predictions, references) == pytest.approx(scores, abs=1e-9)
    metric = Cider(tokenise=str)
    metric.update(predictions, references)
    assert metric.compute().item() == pytest.approx(mean, abs=1e-9)
    assert metric.compute().dtype == torch.float64
    assert 0.5 < mean < 10, "captions too easy or too hard to tell anything"


def coco_frozen(prediction, references, of_corpus):
    """COCO's scorer with the document frequencies of another corpus."""
    coco = CiderScorer()
    for accepted in of_corpus:
        coco += ("", accepted)
    coco.compute_doc_freq()
    # It takes the number of documents from the list of references, and scores as many as there are predictions.
    coco.ctest, coco.crefs = [cook_test(prediction)], [cook_refs(references)] + [None] * (len(of_corpus) - 1)
    return coco.compute_cider()[0]


def test_frozen_frequencies_equal_coco_and_make_samples_independent():
    _, of_corpus = corpus(7, size=60)
    predictions, references = corpus(8, size=20)
    frequencies = DocumentFrequencies.from_references(of_corpus, tokenise=str)
    expected = [coco_frozen(p, refs, of_corpus) for p, refs in zip(predictions, references, strict=True)]
    scores = [cider_d(p, refs, frequencies) for p, refs in zip(predictions, references, strict=True)]
    assert scores == pytest.approx(expected, abs=1e-9)
    assert scores != pytest.approx(corpus_cider_d(predictions, references), abs=1e-3)
    metric = AnswerScore("cider", frequencies)
    for p, refs in zip(predictions, references, strict=True):
        metric.update([p], [refs])
    assert metric.compute().item() == pytest.approx(sum(expected) / len(expected), abs=1e-9)


def test_frozen_on_the_scored_references_is_the_corpus_score():
    predictions, references = corpus(3)
    frequencies = DocumentFrequencies.from_references(iter(references), tokenise=str)
    frozen = [cider_d(p, refs, frequencies) for p, refs in zip(predictions, references, strict=True)]
    assert frozen == corpus_cider_d(predictions, references)


def test_scorer_tokenises_both_sides():
    raw = [["A dog runs.", "The dog, running!"], ["A cat sits."], ["Two cats ( grey ) sleep"]]
    frequencies = DocumentFrequencies.from_references(raw)
    assert frequencies.documents == 3
    assert frequencies.counts["a"] == 2
    assert frequencies.counts["a dog"] == 1
    score = scorer("cider", frequencies)
    tokens = [[tokenise_caption(text) for text in refs] for refs in raw]
    assert score("a DOG runs !", raw[0]) == pytest.approx(coco_frozen("a dog runs", tokens[0], tokens), abs=1e-9)
    assert score("a dog runs", raw[0]) > 1


def test_frequencies_survive_json(tmp_path):
    _, references = corpus(1)
    frequencies = DocumentFrequencies.from_references([*references, ["un café “là”"]])
    assert DocumentFrequencies.from_json(frequencies.to_json()) == frequencies
    frequencies.save(tmp_path / "df.json")
    assert DocumentFrequencies.load(tmp_path / "df.json") == frequencies
    again = DocumentFrequencies.from_references([["un café “là”"], *reversed(references)])
    assert again.to_json() == frequencies.to_json(), "the same corpus, the same file"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "of schema 1"),
        (json.dumps({"schema": 2, "documents": 1, "counts": {}}), "of schema 1"),
        (json.dumps({"schema": 1, "documents": 2}), "must hold `documents`"),
        (json.dumps({"schema": 1, "documents": True, "counts": {}}), "must hold `documents`"),
        (json.dumps({"schema": 1, "documents": 2, "counts": {"a": 3}}), "'a' must occur in 1 to 2 documents, got 3"),
        (json.dumps({"schema": 1, "documents": 2, "counts": {"a": 0.5}}), r"got 0\.5"),
    ],
)
def test_bad_frequencies_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        DocumentFrequencies.from_json(text, "df.json")


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="got no picture"):
        DocumentFrequencies.from_references([])
    with pytest.raises(ValueError, match=r"must be a list of at least one text, got 'a dog'"):
        DocumentFrequencies.from_references(["a dog"])
    with pytest.raises(ValueError, match="2 predictions for 1"):
        Cider().update(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="at least one text"):
        Cider().update(["a"], [[]])


def test_nothing_scored_is_nan():
    assert Cider().compute().isnan()
    assert corpus_cider_d([], []) == []
