"""CIDEr-D: how much a caption says of what people say of the same picture and of few others."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_mue.files import write_text
from lightning_mue.metrics.checks import check_batch, check_references
from lightning_mue.metrics.tokens import ngrams, tokenise_caption

SCHEMA = 1
ORDERS = (1, 2, 3, 4)
SIGMA = 6.0
"""Standard deviation of the length penalty, in words."""


@dataclass(frozen=True)
class DocumentFrequencies:
    """In how many documents of a fixed corpus each n-gram occurs; a document is all references of one picture.

    With frequencies frozen, the score of a sample depends on the sample alone.

    Args:
        documents: their number.
        counts: n-gram (words joined by a space) -> documents that hold it.
    """

    documents: int
    counts: Mapping[str, int]

    @classmethod
    def from_references(
        cls, references: Iterable[Sequence[str]], tokenise: Callable[[str], str] = tokenise_caption
    ) -> DocumentFrequencies:
        """Count a corpus.

        Args:
            references: the references of each picture.
            tokenise: text -> tokens joined by spaces; ``str`` leaves tokenised text alone.

        Raises:
            ValueError: no picture, or one without references.
        """
        documents, counts = 0, Counter[str]()
        for captions in references:
            check_references(captions)
            words = [tokenise(caption).split() for caption in captions]
            counts.update({gram for each in words for n in ORDERS for gram in ngrams(each, n)})
            documents += 1
        if not documents:
            raise ValueError("Document frequencies need a corpus of references, got no picture")
        return cls(documents, dict(counts))

    def idf(self, ngram: str) -> float:
        """Return the n-gram's inverse document frequency; one never seen counts as seen once."""
        return math.log(self.documents) - math.log(self.counts.get(ngram, 1))

    def to_json(self) -> str:
        """Return the frequencies as JSON."""
        data = {"schema": SCHEMA, "documents": self.documents, "counts": dict(self.counts)}
        return json.dumps(data, ensure_ascii=False, sort_keys=True) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the frequencies as JSON."""
        write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> DocumentFrequencies:
        """Read frequencies from a JSON file."""
        return cls.from_json(Path(path).read_text(encoding="utf-8"), str(path))

    @classmethod
    def from_json(cls, text: str, source: str = "the document frequencies") -> DocumentFrequencies:
        """Read frequencies; ``source`` names them in errors.

        Raises:
            ValueError: not JSON, another schema, or counts that no corpus can have.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{source} is not JSON ({error}); count the references again.") from error
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise ValueError(f"{source} must be document frequencies of schema {SCHEMA}; count the references again.")
        documents, counts = data.get("documents"), data.get("counts")
        if type(documents) is not int or not isinstance(counts, dict):
            raise ValueError(f"{source} must hold `documents`, a number, and `counts`, a mapping")
        for ngram, count in counts.items():
            if type(count) is not int or not 1 <= count <= documents:
                raise ValueError(f"{source}: {ngram!r} must occur in 1 to {documents} documents, got {count!r}")
        return cls(documents, counts)


def cider_d(prediction: str, references: Sequence[str], frequencies: DocumentFrequencies) -> float:
    """Score one caption by CIDEr-D (Vedantam et al. 2015, section 6), as COCO's evaluation computes it.

    Cosines of tf-idf vectors, clipped at the reference's weights and punished for another length, are averaged over
    n = 1..4 and the references, times 10.

    Args:
        prediction: the caption, tokens joined by spaces.
        references: likewise, at least one.
        frequencies: of the reference corpus.

    Returns:
        A number in [0, 10]; 0 if every n-gram is in all documents, as in a corpus of one.
    """
    check_references(references)
    ours = _vectors(prediction, frequencies)
    similarities = [_similarity(ours, _vectors(reference, frequencies)) for reference in references]
    return 10 * sum(similarities) / len(similarities)


def corpus_cider_d(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Score captions by CIDEr-D with the document frequencies of their own references.

    Args:
        predictions: captions, tokens joined by spaces.
        references: of each caption, likewise, at least one.

    Returns:
        One number in [0, 10] per caption.
    """
    check_batch(predictions, references)
    if not predictions:
        return []
    frequencies = DocumentFrequencies.from_references(references, tokenise=str)
    return [cider_d(p, refs, frequencies) for p, refs in zip(predictions, references, strict=True)]


@dataclass(frozen=True)
class _Vectors:
    """A text's tf-idf weights and their norm, by order, and its number of words."""

    weights: list[dict[str, float]]
    norms: list[float]
    length: int


def _vectors(text: str, frequencies: DocumentFrequencies) -> _Vectors:
    words = text.split()
    weights = [{gram: k * frequencies.idf(gram) for gram, k in ngrams(words, n).items()} for n in ORDERS]
    norms = [math.sqrt(sum(w * w for w in order.values())) for order in weights]
    return _Vectors(weights, norms, len(words))


def _similarity(ours: _Vectors, theirs: _Vectors) -> float:
    total = 0.0
    for a, b, norm_a, norm_b in zip(ours.weights, theirs.weights, ours.norms, theirs.norms, strict=True):
        if norm_a and norm_b:
            total += sum(min(w, b[gram]) * b[gram] for gram, w in a.items() if gram in b) / (norm_a * norm_b)
    return total / len(ORDERS) * math.exp(-((ours.length - theirs.length) ** 2) / (2 * SIGMA**2))


class Cider(Metric):
    """Mean CIDEr-D over all captions on every rank, with the document frequencies of their own references.

    A caption's score depends on all others; for the mean under frozen frequencies use ``AnswerScore("cider", ...)``.

    Args:
        tokenise: text -> tokens joined by spaces; ``str`` leaves tokenised text alone.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    texts: list[Tensor]

    def __init__(self, tokenise: Callable[[str], str] = tokenise_caption) -> None:
        super().__init__()
        self.tokenise = tokenise
        # Only tensors travel between ranks: lines of JSON as bytes.
        self.add_state("texts", [], dist_reduce_fx="cat")
        self.set_dtype(torch.uint8)  # a rank without captions sends an empty tensor of the metric's type

    def update(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        """Add captions, each with its references.

        Raises:
            ValueError: the numbers of captions and reference lists differ, or a caption has no references.
        """
        check_batch(predictions, references)
        rows = [[self.tokenise(text) for text in (p, *refs)] for p, refs in zip(predictions, references, strict=True)]
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        self.texts.append(torch.tensor(list(lines), dtype=torch.uint8, device=self.device))

    def compute(self) -> Tensor:
        """Return the mean, a float64 scalar; NaN before the first caption."""
        lines = dim_zero_cat(self.texts).cpu().numpy().tobytes() if len(self.texts) else b""
        rows = [json.loads(line) for line in lines.splitlines()]
        scores = corpus_cider_d([row[0] for row in rows], [row[1:] for row in rows])
        return torch.tensor(scores, dtype=torch.float64).mean().to(self.device)
