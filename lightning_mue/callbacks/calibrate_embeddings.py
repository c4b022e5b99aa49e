"""CalibrateEmbeddings: exits of either tower that keep retrieval or zero-shot quality, with a certificate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from lightning_mue.backbones import fingerprint, view
from lightning_mue.calibration import Proposal, Tested
from lightning_mue.calibration.losses import check_level
from lightning_mue.callbacks.batch_keys import BatchKeys, Inputs, Key
from lightning_mue.callbacks.batches import Batch, in_split, single
from lightning_mue.callbacks.calibration import Ask, Asked, Calibration, Certifies
from lightning_mue.callbacks.embedding import Embedding
from lightning_mue.callbacks.journal import Journal
from lightning_mue.callbacks.ledger import Reuse
from lightning_mue.callbacks.multi_exit_supervision import find_model
from lightning_mue.callbacks.outcome import (
    INDEPENDENT,
    Calibrates,
    intents_beside,
    log_result,
    refuse_nothing,
    refuse_one_part,
    write_policy,
)
from lightning_mue.callbacks.ranks import check_visible, gather, lead, refuse_sharded
from lightning_mue.callbacks.scoring import processor_of
from lightning_mue.callbacks.search import Search
from lightning_mue.exits import attached
from lightning_mue.inference.embedding import Query
from lightning_mue.latency import LatencyTable
from lightning_mue.policy import ExitPolicy
from lightning_mue.policy_file import EMBED_POLICIES
from lightning_mue.promise import Promise
from lightning_mue.trace import Trace


class CalibrateEmbeddings(Calibrates):
    """Chooses when pictures, or texts, may leave their tower early, so that they still find each other, and proves it.

    In ``validate`` and ``mue calibrate``, as CalibrateExits does for answers: the *propose* part of the validation
    data is recorded at full depth, policies are simulated against measured times, a chain of them is fixed, and tested
    in order by embedding the *certify* part. Inside ``fit`` it does nothing. Recall over a gallery made of the tested
    samples would be no mean of independent ones. So the candidates are fixed in advance: texts or pictures of the
    *propose* part, or the texts of the classes. Candidates, and what a query should find, are embedded at full depth,
    as a gallery is in advance: nothing is promised of two sides that both left early.

    Args:
        keep: fraction of the full-depth metric to keep.
        metric: ``recall_at_1``, ``recall_at_5`` or ``recall_at_10`` (a query finds its own among the candidates), or
            ``top_1`` (zero-shot classification of pictures).
        query: what leaves early and looks for the other. A ``picture`` finds one of its references; a ``text``, the
            first reference of each sample, finds its picture. For both take two callbacks.
        candidates: texts, or pictures, that are drawn at most.
        classes: names of the classes, as references name them; pictures of none are not counted by ``top_1``. With
            classes, ``class_margin`` is a signal too. Of pictures alone.
        template: makes a text of a class's name.
        confidence_level: of the promise.
        estimate: as in CalibrateExits, like the four that follow.
        reuse: whether samples that certified another chain are refused, or spend confidence.
        seed: of the candidates' draw and of the certificate's one permutation.
        model: attribute that holds the backbone.
        out: where the policy goes; ``embed_policy.json``, of texts ``embed_text_policy.json``, beside the checkpoint if
            not given.
        folder: of the journal.
        latency_repeats: of each measurement of the latency table.
        inputs: where batches hold the backbone's inputs.
        references: key of a picture's own texts.
        sample_id: key of the samples' names.
        cluster: key of what was drawn independently.

    Raises:
        ValueError: the promise cannot be made.
    """

    def __init__(
        self,
        keep: float = 0.99,
        metric: str = "recall_at_5",
        query: Query = "picture",
        candidates: int = 500,
        classes: list[str] | None = None,
        template: str = "{}",
        confidence_level: float = 0.95,
        estimate: bool = True,
        reuse: Reuse = "refuse",
        seed: int = 0,
        model: str | None = None,
        out: str | None = None,
        folder: str | None = None,
        latency_repeats: int = 30,
        inputs: Inputs = None,
        references: Key | None = None,
        sample_id: Key | None = None,
        cluster: Key | None = None,
    ) -> None:
        self.search = Search(metric, query, candidates, seed, tuple(classes or ()), template)
        self.file = EMBED_POLICIES[query]
        self.keep, self.confidence_level, self.seed = keep, confidence_level, seed
        self.estimate, self.reuse, self.model, self.out, self.folder = estimate, reuse, model, out, folder
        self.latency_repeats = latency_repeats
        self.keys = BatchKeys(inputs, references, sample_id, cluster)
        self.policy: ExitPolicy | None = None
        self.proposal: Proposal | None = None
        self.tests: list[Tested] = []
        self.trace: Trace | None = None
        self.latency: LatencyTable | None = None
        self._proposes: dict[str, tuple[str, list[str]]] = {}
        self._certifies: dict[str, tuple[str, str]] = {}
        self._one: Batch | None = None
        self.check()

    def check(self) -> None:
        """Check the promise.

        Raises:
            ValueError: it cannot be made.
        """
        check_level(self.confidence_level)
        _ = self._promise

    @property
    def _promise(self) -> Promise:
        return Promise(self.search.metric, keep=self.keep)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forget an earlier calibration."""
        self.calibration = None

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse to end without a policy."""
        refuse_nothing(stage, self.calibration)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the journal."""
        self.calibration = None
        if trainer.sanity_checking or trainer.state.fn == TrainerFn.FITTING:
            return
        model = find_model(trainer, pl_module, self.model)
        refuse_sharded(trainer.model or model)
        exits, data = attached(model), getattr(trainer, "datamodule", None)
        key = {
            "fingerprint": fingerprint(model),
            "exits": exits.config.to_dict() if exits is not None else None,
            "device": next(model.parameters()).device.type,
            "search": [self.search.metric, self.search.query, list(self.search.classes), list(self.search.class_texts)],
            "data": getattr(data, "calibration_fingerprint", ""),
        }
        journal = Journal(self.folder or Path(trainer.default_root_dir) / "calibration", key)
        asked = Asked([self._promise], self.confidence_level, self.seed, self.estimate, self.reuse)
        if processor_of(trainer) is None:
            raise ValueError(
                "CalibrateEmbeddings embeds texts: it needs a data module, or a LightningModule, with a `processor`."
            )
        self._subject = Embedding(trainer, model, self.search, journal, self.keys)
        self._subject.whole.branch(self.search.query).attached()  # nothing is read where nothing can be left
        self.calibration = Calibration(model, asked, self._subject, journal, self.keys)
        self._proposes, self._certifies, self._one = {}, {}, None

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Remember the texts of samples that propose, and which samples certify."""
        if (run := self.calibration) is None:
            return
        if not self.keys.names_clusters(batch):
            run.note = INDEPENDENT
        batch = self.keys.read(batch, view(run.model).generate_inputs)
        if "references" not in batch:
            raise ValueError(
                f"Metric {self.search.metric!r} needs batches with `references`: each picture's own texts."
            )
        batch = self._subject.counted(batch)
        for row, certifies in enumerate(in_split(trainer, batch, "certify")):
            name, cluster = batch["sample_id"][row], batch["cluster"][row]
            if certifies:
                self._certifies[name] = (cluster, batch["group"][row])
            else:
                self._proposes[name] = (cluster, batch["references"][row])
        if self._one is None and batch["sample_id"]:
            self._one = single(batch, 0)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Propose and certify."""
        if (run := self.calibration) is None:
            return
        proposes, certifies = (dict(sorted(gather([*seen.items()]))) for seen in (self._proposes, self._certifies))
        if self.search.metric == "top_1" and not proposes and not certifies:
            raise ValueError(
                f"No picture has one of the classes {list(self.search.classes)[:5]} among its references; `classes` "
                "are names as references write them."
            )
        refuse_one_part(len(proposes), "samples", len(certifies))
        one = next(batch for batch in gather([self._one]) if batch is not None)  # rank 0 may have seen none
        run.note = max(gather([run.note]))
        run.beside = intents_beside(trainer, self)
        count, search = len(self._subject.look_among(proposes).texts), self.search
        queries = f"{search.query.capitalize()}s look among {count} fixed {search.others}"
        run.note = f"{run.note} {queries} and their own, embedded at full depth.".strip()
        choose = partial(self._choose, run, certifies, one)
        self.latency, self.proposal, policy, self.tests = lead(choose, run.decode)
        run.forget()
        self.policy = replace(policy, classes=self.search.class_texts)  # full depth tells them apart too
        assert self.proposal is not None
        name = "embeddings" if search.query == "picture" else "text_embeddings"
        name = name if self.out is None else f"{name}/{Path(self.out).stem}"
        log_result(pl_module, name, self.policy, self.proposal, self.tests)
        write_policy(trainer, self.policy, self)

    def _choose(
        self, run: Calibration, certifies: Certifies, one: Batch, ask: Ask
    ) -> tuple[LatencyTable, Proposal, ExitPolicy, list[Tested]]:
        """Propose and certify, on rank 0; all ranks embed what it asks for."""
        paths: Sequence[Path] = ask(("propose", None, None, ()))
        check_visible(paths)
        self.trace = Trace.merge([Trace.load(p) for p in paths])
        latency = run.measure(one, self.latency_repeats)
        proposal = run.propose(self.trace, latency, certifies, {}, ask)
        return latency, proposal, *run.certify(proposal, self.trace, certifies, ask)
