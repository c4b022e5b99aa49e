"""CalibrateExits: thresholds with a certificate, from a validation pass."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from lightning_mue.backbones import view
from lightning_mue.calibration import Proposal, Tested, propose, uncertified
from lightning_mue.calibration.losses import check_level
from lightning_mue.callbacks.answering import Answering
from lightning_mue.callbacks.batch_keys import BatchKeys, Inputs, Key
from lightning_mue.callbacks.batches import Batch, in_split, rows_of, single
from lightning_mue.callbacks.calibration import Ask, Asked, Calibration, Certifies
from lightning_mue.callbacks.collect_trace import open_journal, record_batch
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
from lightning_mue.callbacks.scoring import Scoring
from lightning_mue.data import ShardsDataModule
from lightning_mue.exits import attached
from lightning_mue.inference.runtime import RuntimeName
from lightning_mue.latency import LatencyTable
from lightning_mue.policy import ExitPolicy
from lightning_mue.promise import OF_EMBEDDINGS, Promise
from lightning_mue.trace import Trace


class CalibrateExits(Calibrates):
    """Chooses exit thresholds that keep a promised quality, and proves it by decoding data kept for that.

    In ``validate`` and ``mue calibrate``: records the *propose* part of the validation data at full depth, measures a
    latency table, simulates all policies, decodes the best there, fixes a chain of them from safe to bold, and tests it
    in order by decoding the *certify* part. Writes ``policy.json`` beside the checkpoint. Inside ``fit`` it only
    simulates, on a few samples, and logs (with ``fit_samples`` > 0); that policy is marked uncertified, for that data
    chooses the checkpoint.

    Args:
        keep: fraction of the full-depth metric to keep, or for ``consistency`` of outputs to leave unchanged.
        metric: one of ``promise.METRICS``; if not given, ``exact_match`` with ShardsDataModule or named ``references``,
            else ``consistency``, which needs none.
        promises: instead of ``keep`` and ``metric``: several things to keep at once, or an absolute ``drop``.
        group_by: key of what samples are grouped by, such as the type of a question: the promises are then kept in
            each group, and groups too small to certify run at full depth.
        latency_ms: instead of ``keep``: milliseconds a sample may take by the latency table; the certificate says the
            largest share of each metric that is shown to be kept within them.
        speedup: likewise, how many times as fast as full depth it has to be.
        confidence_level: of all promises together.
        estimate: with too few samples to certify anything, choose by an estimate, which promises nothing.
        reuse: whether samples that certified another chain of these weights are refused, or spend confidence.
        lower_precision: precisions that compete with leaving early, each with the best policies and full depth; the
            promise is against full depth in the model's own. If not given ``bfloat16``, in ONNX Runtime ``int8``.
        runtime: what runs the layers, ``torch`` or ``onnxruntime``; the policy is then for that.
        frequencies: file of document frequencies for ``cider``; those of the training references if not given.
        seed: of the certificate's one permutation.
        max_new_tokens: of each answer; the generation config's if not given.
        model: attribute that holds the backbone; if not given, that of MultiExitSupervision here, else ``model``.
        out: where the policy goes; ``policy.json`` beside the checkpoint if not given. Two instances name two files.
        folder: of the journal that lets an interrupted calibration go on; ``<default_root_dir>/calibration``.
        latency_repeats: of each measurement of the latency table.
        fit_samples: simulated at each validation inside ``fit``; 0 for none.
        inputs: where the batches of a project hold the backbone's inputs, such as ``{"pixel_values": "image"}``, or the
            key of a mapping that holds them all; if not given, under their own names. Keys are positions in a tuple.
        references: key of the accepted answers; ``references`` if not given, and there need be none.
        sample_id: key of the samples' names; ``sample_id`` if not given, else a hash of each sample's inputs.
        cluster: key of what was drawn independently, such as the picture; ``cluster`` if not given, else every sample
            counts as independent, and the certificate says so.
    """

    def __init__(
        self,
        keep: float = 0.98,
        metric: str | None = None,
        promises: list[Promise] | None = None,
        group_by: Key | None = None,
        latency_ms: float | None = None,
        speedup: float | None = None,
        confidence_level: float = 0.95,
        estimate: bool = True,
        reuse: Reuse = "refuse",
        lower_precision: list[str] | None = None,
        runtime: RuntimeName = "torch",
        frequencies: str | None = None,
        seed: int = 0,
        max_new_tokens: int | None = None,
        model: str | None = None,
        out: str | None = None,
        folder: str | None = None,
        latency_repeats: int = 30,
        fit_samples: int = 0,
        inputs: Inputs = None,
        references: Key | None = None,
        sample_id: Key | None = None,
        cluster: Key | None = None,
    ) -> None:
        self.keep, self.confidence_level, self.seed = keep, confidence_level, seed
        self.metric, self.promises = metric or "", promises  # chosen when the data is known
        self.latency_ms, self.speedup = latency_ms, speedup
        lowest = "bfloat16" if runtime == "torch" else "int8"
        self.lower_precision, self.runtime = [lowest] if lower_precision is None else lower_precision, runtime
        self.estimate, self.reuse, self.frequencies = estimate, reuse, frequencies
        self.max_new_tokens, self.model, self.out, self.folder = max_new_tokens, model, out, folder
        self.latency_repeats, self.fit_samples = latency_repeats, fit_samples
        self.keys = BatchKeys(inputs, references, sample_id, cluster, group_by)
        self.policy: ExitPolicy | None = None
        self.proposal: Proposal | None = None
        self.tests: list[Tested] = []
        self.trace: Trace | None = None
        self.latency: LatencyTable | None = None
        self._paths: list[Path] = []
        self._certifies: dict[str, tuple[str, str]] = {}
        self._one: Batch | None = None
        self._seen = 0
        self.check()

    def check(self) -> None:
        """Check the promise.

        Raises:
            ValueError: it cannot be made.
        """
        check_level(self.confidence_level)
        asked = {self.metric, *(promise.metric for promise in self.promises or ())}
        if about := sorted(asked & OF_EMBEDDINGS.keys()):
            raise ValueError(
                f"{about} are about embeddings, and this calibrates answers; CalibrateEmbeddings does those"
            )
        if self.promises is not None and self.metric:
            raise ValueError(
                f"Give `promises`, or `keep` and `metric`; both are given (metric {self.metric!r}). Where a recipe "
                "names a metric, `metric: null` beside `promises` takes it back"
            )
        budget = [limit for limit in (self.latency_ms, self.speedup) if limit is not None]
        if len(budget) > 1 or any(not limit > 0 for limit in budget):
            raise ValueError(
                f"The budget is `latency_ms` or `speedup`, above 0, got {self.latency_ms} and {self.speedup}"
            )
        if budget and self.keys.group is not None:
            raise ValueError("Within a budget nothing can be promised by group; leave `group_by` or the budget out")
        if not self._promised:
            raise ValueError("`promises` is empty; leave it out to promise `keep` of `metric`")

    @property
    def _promised(self) -> list[Promise]:
        """What has to be kept."""
        if self.promises is not None:
            return self.promises
        return [Promise(self.metric or "consistency", keep=self.keep)]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forget an earlier calibration."""
        self.calibration = None

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse to end without a policy: Lightning passes over validation without data, and over all its hooks."""
        refuse_nothing(stage, self.calibration)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the journal."""
        self.calibration = None
        fitting = trainer.state.fn == TrainerFn.FITTING
        if trainer.sanity_checking or (fitting and not self.fit_samples):
            return
        model = find_model(trainer, pl_module, self.model)
        exits = attached(model)
        if exits is None or not exits.layers:
            raise ValueError("There are no exits to calibrate; call `attach_exits(model, config)` and train them.")
        refuse_sharded(trainer.model or model)
        if not self.metric and self.promises is None:
            ours = isinstance(getattr(trainer, "datamodule", None), ShardsDataModule)
            self.metric = "exact_match" if ours or self.keys.references is not None else "consistency"
        budget = (self.latency_ms, self.speedup)
        asked = Asked(self._promised, self.confidence_level, self.seed, self.estimate, self.reuse, *budget)
        self._scoring = Scoring(trainer, [promise.metric for promise in asked.promises], self.frequencies)
        journal = open_journal(trainer, model, self._scoring, self.max_new_tokens, self.folder)
        how = (self._scoring, journal, self.keys, self.max_new_tokens, self.runtime)
        self.calibration = Calibration(model, asked, Answering(trainer, model, *how), journal, self.keys)
        self._paths, self._certifies, self._one, self._seen = [], {}, None, 0

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Record the rows that propose; remember which rows certify."""
        if (run := self.calibration) is None:
            return
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting and self._seen >= self.fit_samples:
            return
        if not self.keys.names_clusters(batch):
            run.note = INDEPENDENT
        batch = self.keys.read(batch, view(run.model).generate_inputs)
        self._seen += len(batch["sample_id"])
        certifies = in_split(trainer, batch, "certify")
        for row, certify_row in enumerate(certifies):
            if certify_row:
                self._certifies[batch["sample_id"][row]] = (batch["cluster"][row], batch["group"][row])
        if self._one is None:
            self._one = single(batch, 0)
        chosen = batch if fitting else rows_of(batch, [not c for c in certifies])
        path = record_batch(trainer, run.model, chosen, self._scoring, self.max_new_tokens, run.journal)
        self._paths += [path] if path is not None else []

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Propose, and outside of ``fit`` certify."""
        if (run := self.calibration) is None:
            return
        paths, certifies = sorted(set(gather(self._paths))), dict(sorted(gather(list(self._certifies.items()))))
        fitting = trainer.state.fn == TrainerFn.FITTING
        refuse_one_part(len(paths), "batches", len(certifies) or fitting)
        one = next(batch for batch in gather([self._one]) if batch is not None)  # rank 0 may have seen none
        run.note = max(gather([run.note]))
        run.beside = intents_beside(trainer, self)
        choose = partial(self._choose, run, paths, certifies, one, fitting)
        self.latency, self.proposal, self.policy, self.tests = lead(choose, run.decode)
        run.forget()
        if fitting:
            self._log_simulation(pl_module)
            return
        assert self.policy is not None
        assert self.proposal is not None
        name = "exits" if self.out is None else f"exits/{Path(self.out).stem}"
        log_result(pl_module, name, self.policy, self.proposal, self.tests)
        write_policy(trainer, self.policy, self)

    def _choose(
        self, run: Calibration, paths: Sequence[Path], certifies: Certifies, one: Batch, fitting: bool, ask: Ask
    ) -> tuple[LatencyTable, Proposal, ExitPolicy | None, list[Tested]]:
        """Propose, and outside of ``fit`` certify, on rank 0; all ranks decode what it asks for."""
        check_visible(paths)
        self.trace = Trace.merge([Trace.load(p) for p in paths])
        latency = run.measure(one, self.latency_repeats)
        if fitting:
            return latency, propose(self.trace, latency, run.asked.promises), self.policy, []
        lower = {p: run.measure(one, self.latency_repeats, p) for p in self.lower_precision}
        proposal = run.propose(self.trace, latency, certifies, lower, ask)
        return latency, proposal, *run.certify(proposal, self.trace, certifies, ask)

    def _log_simulation(self, pl_module: L.LightningModule) -> None:
        assert self.proposal is not None
        full = self.proposal.full_depth
        safe = [c for c in self.proposal.chain if c.used <= 1] or [full]
        best = min(safe, key=lambda c: c.ms)
        self.policy = uncertified(best, self._promised, self.confidence_level)
        pl_module.log("exits/simulated_speedup", full.ms / best.ms, rank_zero_only=False, sync_dist=True)
        for stream, depth in best.depths.items():
            pl_module.log(f"exits/simulated_depth_{stream}", depth, sync_dist=True)
