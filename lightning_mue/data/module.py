"""The Lightning data module over WebDataset shards: training, calibration and test data of one task."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_mue.data.augment import AUGMENTATIONS, Augmentation
from lightning_mue.data.loader import BatchLoader, EncodedBatches, Processor, eval_batches, train_batches
from lightning_mue.data.shards import BadSamples, OnBad, find_shards
from lightning_mue.data.store import SampleStore, limited, read_samples
from lightning_mue.data.tasks import STATEMENT_WORDS, check_also, cluster_point, split_of
from lightning_mue.data.tokenizer import train_pieces, train_tokenizer
from lightning_mue.inference.answers import only_answers


class ShardsDataModule(LightningDataModule):
    """Batches of one task from WebDataset shards.

    A batch is a dict: ``pixel_values`` float [B, 3, H, W], ``input_ids`` and ``attention_mask`` [B, S], ``labels``
    [B, T] (-100 at padding, ended by ``</s>``), ``decoder_prompt`` [B, P] if the task has one (-100 at padding), and
    lists of B: ``sample_id``, ``cluster``, ``references``, ``level``, ``prompt``, and ``question_type`` and the like.

    Calibration data never chose a checkpoint: it is the ``holdout`` share of the training pictures, or, with
    ``holdout`` 0, the part of the validation pictures that is not in the ``select`` share that ``fit`` validates on.
    Clusters stay whole in every split, and a hash of their name decides, so a split never changes.

    Args:
        train: a folder (its ``train-*.tar``), a tar, a glob, or a list of these.
        val: likewise (``val-*.tar``); the folder of ``train`` when not given.
        task: "vqa", "statement", "match", "caption", "reading" or "document".
        test: likewise (``test-*.tar``); when not given, those in the folder of ``train``, else the validation data.
        batch_size: training samples a batch and device.
        group_by_length: train on batches of pages and answers of like length, so that little of them is padding.
        augment: random changes of training pictures: ``affine``, ``flip``, ``contrast``; of a page's words: ``digits``.
        eval_batch_size: samples a batch otherwise; the composition of these batches knows no number of devices.
        image_size: pictures are resized to this many pixels a side, or to ``[height, width]``.
        image_tokens: tokens that the backbone makes of a picture.
        keep_aspect: resize pictures to fit inside ``image_size`` and pad them, instead of stretching.
        vocab_size: most tokens of the tokenizer, which is trained on the training texts.
        processor: of a pretrained backbone: its folder or hub name. It is used as it is: no tokenizer is trained, and
            ``image_size``, ``image_tokens``, ``keep_aspect`` and ``vocab_size`` are not read.
        holdout: share of the training pictures kept out of training, for calibration.
        select: share of the validation pictures that ``fit`` validates on when ``holdout`` is 0.
        calibration_limit: most calibration samples (whole clusters, chosen by hash); None takes all.
        questions_per_picture: most samples of a picture and task, chosen by hash; None takes all.
        also: other tasks to train on beside ``task``, of the same pictures; nothing else is done with them.
        memory_limit_mb: pictures of a split stay decoded in memory until they fill this (10^6 bytes).
        num_workers: processes that make batches; 0 makes them in the training process (so may gloo, see BatchLoader).
        seed: decides the order of training and the splits.
        on_bad: "raise" refuses broken shards and samples, "skip" leaves them out and counts them.
    """

    def __init__(
        self,
        train: str | list[str],
        task: str,
        val: str | list[str] | None = None,
        test: str | list[str] | None = None,
        batch_size: int = 32,
        group_by_length: bool = False,
        augment: list[Augmentation] | None = None,
        eval_batch_size: int = 32,
        image_size: int | list[int] = 64,
        image_tokens: int = 4,
        keep_aspect: bool = False,
        vocab_size: int = 1000,
        processor: str | None = None,
        holdout: float = 0.0,
        select: float = 0.3,
        calibration_limit: int | None = None,
        questions_per_picture: int | None = None,
        also: list[str] | None = None,
        memory_limit_mb: float = 1000.0,
        num_workers: int = 0,
        seed: int = 0,
        on_bad: OnBad = "raise",
    ) -> None:
        super().__init__()
        for name, share in (("holdout", holdout), ("select", select)):
            if not 0 <= share < 1:
                raise ValueError(f"`{name}` must be a share in [0, 1), got {share}")
        counts = {"batch_size": batch_size, "eval_batch_size": eval_batch_size}
        sides = [image_size] * 2 if isinstance(image_size, int) else image_size
        if len(sides) != 2 or min(sides) < 1:
            raise ValueError(f"`image_size` must be one or two numbers of at least 1, got {image_size}")
        limits = {"calibration_limit": calibration_limit, "questions_per_picture": questions_per_picture}
        for name, number in (counts | limits).items():
            if number is not None and number < 1:
                raise ValueError(f"`{name}` must be at least 1, got {number}")
        if unknown := sorted(set(augment or ()) - set(AUGMENTATIONS)):
            raise ValueError(f"`augment` may name {list(AUGMENTATIONS)}, got {unknown}")
        check_also(task, also)
        # Not for the logger: there it would clash with a module that has a `seed` of its own.
        self.save_hyperparameters(logger=False)
        self.bad = BadSamples(on_bad)
        self._tokenizer_json: str | None = None

    def setup(self, stage: str | None = None) -> None:
        """Reads what the stage needs, so that missing or broken data shows here."""
        if stage in (None, "fit"):
            _ = self.processor, self.train_samples, self.selection_samples
        if stage in (None, "validate"):
            _ = self.calibration_samples
        if stage in ("test", "predict"):
            _ = self.test_samples

    @cached_property
    def train_samples(self) -> SampleStore:
        """The samples that train."""
        return self._part(self._train, "held out", False, "train") if self.hparams["holdout"] else self._train

    @cached_property
    def selection_samples(self) -> SampleStore:
        """What ``fit`` validates on."""
        return self._val if self.hparams["holdout"] else self._part(self._val, "select", True, "selection")

    @cached_property
    def calibration_samples(self) -> SampleStore:
        """What every other run validates on: samples that no training and no choice of a checkpoint has seen."""
        if self.hparams["holdout"]:
            kept = self._part(self._train, "held out", True, "calibration")
            samples = kept.where(lambda sample: sample.task == self.hparams["task"])
        else:
            samples = self._part(self._val, "select", False, "calibration")
        limit = self.hparams["calibration_limit"]
        return samples if limit is None else limited(samples, limit, f"{self.hparams['seed']}/limit")

    @cached_property
    def test_samples(self) -> SampleStore:
        """What ``test`` and ``predict`` run on."""
        if self.hparams["test"] is not None or self.has_test_shards:
            return self._read("test")
        if not self.hparams["holdout"]:
            rank_zero_warn("There is no test data: testing on validation data, which calibration uses too.")
        return self._val

    @property
    def has_test_shards(self) -> bool:
        """Whether the folder of ``train`` holds ``test-*.tar``."""
        folder = self.hparams["train"]
        return isinstance(folder, str) and any(Path(folder).expanduser().glob("test-*.tar"))

    def split_of(self, cluster: str) -> str:
        """Says what a calibration cluster is for: "propose" (30 %) or "certify" (70 %)."""
        return split_of(cluster, {"propose": 0.3, "certify": 0.7}, f"{self.hparams['seed']}/propose")

    @property
    def closed_answers(self) -> list[str] | None:
        """The only answers there are to statements; None where answers are free."""
        return list(STATEMENT_WORDS) if self.hparams["task"] in ("statement", "match") else None

    def answer_constraint(self, end_id: int) -> Callable[[int, Tensor], list[int]] | None:
        """Return the constraint of decoding to the closed answers (``prefix_allowed_tokens_fn``); None where free."""
        if self.closed_answers is None:
            return None
        labels = self.processor.labels(self.closed_answers)
        return only_answers([[int(t) for t in row if t >= 0 and t != end_id] for row in labels], end_id)

    @property
    def calibration_fingerprint(self) -> str:
        """SHA-256 over ids, prompts and references of the calibration data in order of id."""
        digest = hashlib.sha256()
        for sample in sorted(self.calibration_samples.samples, key=lambda sample: sample.sample_id):
            told = (sample.sample_id, sample.cluster, sample.prompt, sample.decoder_prompt, sample.references)
            digest.update(repr(told).encode())
        return digest.hexdigest()

    @property
    def tokenizer_json(self) -> str:
        """The tokenizer: the checkpoint's, or trained on the training texts on first use."""
        if self._tokenizer_json is None:
            samples = self.train_samples.samples
            texts = [t for s in samples for t in (s.prompt, s.decoder_prompt, *s.references, *dict(s.words)) if t]
            train = train_pieces if any(sample.words for sample in samples) else train_tokenizer
            self._tokenizer_json = train(texts, self.hparams["vocab_size"])
        return self._tokenizer_json

    @cached_property
    def processor(self) -> Processor:
        """Turns pictures and texts into tensors and back."""
        if (name := self.hparams["processor"]) is not None:
            return _load_processor(name)
        shape = {name: self.hparams[name] for name in ("image_size", "image_tokens", "keep_aspect")}
        return _build_processor(self.tokenizer_json, **shape)

    def train_dataloader(self) -> BatchLoader:
        """Return this rank's share of shuffled samples; the order is a function of (seed, epoch)."""
        hparams, store = self.hparams, self.train_samples
        rank, world = self._rank_and_world()
        shape = {"count": len(store), "batch_size": hparams["batch_size"], "seed": hparams["seed"]}
        by_length = hparams["group_by_length"]
        dataset = EncodedBatches(store, self.processor, hparams["seed"], hparams["augment"] or ())

        def plan(epoch: int) -> list[list[int]]:
            lengths = [dataset.length(epoch, k) for k in range(len(store))] if by_length else None
            return train_batches(**shape, epoch=epoch, rank=rank, world=world, lengths=lengths)

        more = {"group_by_length": by_length, "also": hparams["also"]}
        name = str(shape | {"world": world} | {option: value for option, value in more.items() if value})
        return BatchLoader(dataset, plan, hparams["num_workers"], name=name)

    def val_dataloader(self) -> BatchLoader:
        """Return the selection data inside ``fit``, else the calibration data."""
        fitting = self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        return self._eval_loader(self.selection_samples if fitting else self.calibration_samples)

    def test_dataloader(self) -> BatchLoader:
        """Return the test data."""
        return self._eval_loader(self.test_samples)

    def predict_dataloader(self) -> BatchLoader:
        """Return the test data."""
        return self._eval_loader(self.test_samples)

    def state_dict(self) -> dict[str, Any]:
        """Return the tokenizer's JSON, or the name of the processor."""
        name = self.hparams["processor"]
        return {"tokenizer": self.tokenizer_json} if name is None else {"processor": name}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the tokenizer the checkpoint was trained with; a processor is the run's own, for folders move."""
        kept, asked = state_dict.get("processor"), self.hparams["processor"]
        if (kept is None) != (asked is None):
            raise ValueError(
                f"the checkpoint was trained with `processor` {kept!r}, this run has {asked!r}: give one too, or none"
            )
        if asked is not None:
            return
        self._tokenizer_json = state_dict["tokenizer"]
        self.__dict__.pop("processor", None)  # it may have been built around another tokenizer

    @cached_property
    def _train(self) -> SampleStore:
        return self._read("train")

    @cached_property
    def _val(self) -> SampleStore:
        return self._read("val")

    def _read(self, split: str) -> SampleStore:
        hparams = self.hparams
        where = hparams[split] if hparams[split] is not None else self._train_folder()
        return read_samples(
            find_shards(where, split),
            hparams["task"],
            self.bad,
            hparams["memory_limit_mb"],
            hparams["questions_per_picture"],
            f"{hparams['seed']}/questions",
            (hparams["also"] or ()) if split == "train" else (),
        )

    def _train_folder(self) -> str:
        folder = self.hparams["train"]
        if isinstance(folder, str) and Path(folder).expanduser().is_dir():
            return folder
        raise FileNotFoundError(f"no validation data: `val` is not given and `train` is not a folder but {folder!r}")

    def _part(self, store: SampleStore, share: str, inside: bool, name: str) -> SampleStore:
        """The clusters inside or outside of the share named "select" or "held out"."""
        option = "select" if share == "select" else "holdout"
        salt, part = f"{self.hparams['seed']}/{option}", self.hparams[option]
        kept = store.where(lambda sample: (cluster_point(sample.cluster, salt) < part) == inside)
        if not kept.samples:
            found = len({sample.cluster for sample in store.samples})
            raise ValueError(
                f"no {name} data: `{option}` {part} leaves none of {found} pictures; change it or add data"
            )
        return kept

    def _eval_loader(self, store: SampleStore) -> BatchLoader:
        rank, world = self._rank_and_world()
        ids = [sample.sample_id for sample in store.samples]
        batches = eval_batches(ids, self.hparams["eval_batch_size"], rank, world)
        return BatchLoader(EncodedBatches(store, self.processor), lambda epoch: batches, self.hparams["num_workers"])

    def _rank_and_world(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)


def _build_processor(tokenizer_json: str, **shape: Any) -> Processor:
    # Here and not above: reading data needs no transformers.
    from lightning_mue.backbones.processor import build_processor

    return build_processor(tokenizer_json, **shape)


def _load_processor(name: str) -> Processor:
    from lightning_mue.backbones.processor import Processor

    return Processor.load(name)
