"""Scoring: what calibration measures of answers, the metrics of all promises at once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
from torch import Tensor

from lightning_mue.backbones.processor import Processor
from lightning_mue.callbacks.batches import Batch
from lightning_mue.corpus import CORPUS, sentence_bleu
from lightning_mue.data import ShardsDataModule
from lightning_mue.metrics import DocumentFrequencies
from lightning_mue.metrics.answers import scorer
from lightning_mue.metrics.bleu import caption_counts

Scores = Callable[[Tensor], dict[str, list[float]]]
"""Decoded sequences ``[B, 1 + T]`` -> metric -> score of each."""


class Scoring:
    """Scores the answers of a trainer's batches.

    Args:
        trainer: whose data module or module has the ``processor`` that turns tokens into text.
        metrics: of the promises; ``consistency`` alone reports exact match where it can.
        frequencies: a file of document frequencies, for ``cider``; if not given, those of the training references of
            the data module.

    Raises:
        ValueError: ``cider`` without document frequencies.
    """

    def __init__(self, trainer: L.Trainer, metrics: Sequence[str], frequencies: str | None = None) -> None:
        self.metrics = sorted({*metrics} - {"consistency"})
        self._processor = processor_of(trainer)
        self._frequencies = _frequencies(trainer, frequencies) if "cider" in self.metrics else None

    @property
    def key(self) -> dict[str, Any]:
        """What scores depend on beside the samples, as plain values."""
        if self._frequencies is None:
            return {"metrics": self.metrics}
        digest = hashlib.sha256(self._frequencies.to_json().encode()).hexdigest()[:16]
        return {"metrics": self.metrics, "document_frequencies": f"{self._frequencies.documents} pictures, {digest}"}

    def of(self, batch: Batch) -> Scores:
        """Return what scores decoded sequences of this batch; by captions' smoothed BLEU where BLEU is promised.

        Raises:
            ValueError: a metric that needs references and a processor, and one of them is missing.
        """
        references, processor = batch.get("references"), self._processor
        if processor is None or references is None:
            if not self.metrics:
                return lambda sequences: {}
            owner = "a data module with a `processor`, or a LightningModule with one"
            missing = owner if processor is None else "batches with `references`"
            raise ValueError(f"Metric {self.metrics[0]!r} needs {missing}; without it use metric 'consistency'.")
        names = self.metrics or ["exact_match"]
        rules = {name: _sentence_bleu if name in CORPUS else scorer(name, self._frequencies) for name in names}

        def scores(sequences: Tensor) -> dict[str, list[float]]:
            answers = list(zip(processor.decode(sequences[:, 1:]), references, strict=True))
            return {metric: [rule(text, refs) for text, refs in answers] for metric, rule in rules.items()}

        return scores

    def counts(self, batch: Batch, sequences: Tensor) -> dict[str, list[list[int]]]:
        """Return metric of a corpus -> what is counted in each decoded sequence; nothing if none is promised."""
        if not (names := [metric for metric in self.metrics if metric in CORPUS]):
            return {}
        assert self._processor is not None
        answers = list(zip(self._processor.decode(sequences[:, 1:]), batch["references"], strict=True))
        return {metric: [caption_counts(text, refs) for text, refs in answers] for metric in names}


def _sentence_bleu(prediction: str, references: Sequence[str]) -> float:
    return sentence_bleu(caption_counts(prediction, references))


def _frequencies(trainer: L.Trainer, path: str | None) -> DocumentFrequencies:
    if path is not None:
        return DocumentFrequencies.load(path)
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, ShardsDataModule):
        raise ValueError(
            "Metric 'cider' needs document frequencies of references that are not those of the calibration data: give "
            "`frequencies`, a file that DocumentFrequencies.from_references(...).save(FILE) made of training captions"
        )
    samples = (s for s in data.train_samples.samples if s.task == data.hparams["task"])
    return DocumentFrequencies.from_references(sample.references for sample in samples)


def processor_of(trainer: L.Trainer) -> Any:
    """Return what turns tokens into text: the data module's or the module's, ours or one of transformers."""
    owners = (getattr(trainer, "datamodule", None), trainer.lightning_module)
    found = next((p for p in (getattr(owner, "processor", None) for owner in owners) if p is not None), None)
    foreign = hasattr(found, "tokenizer") and not isinstance(found, Processor)
    return Processor(found) if foreign else found
