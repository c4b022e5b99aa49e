"""CalibrateExits: thresholds with a certificate, from a validation pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from lightning_mue.backbones import fingerprint, view
from lightning_mue.calibration.certify import Provenance, Tested, certify, uncertified
from lightning_mue.calibration.losses import check_promise
from lightning_mue.calibration.propose import Proposal, propose
from lightning_mue.calibration.rehearse import rehearse
from lightning_mue.calibration.sample_size import shortage
from lightning_mue.callbacks.batch_keys import BatchKeys, Inputs, Key
from lightning_mue.callbacks.batches import Batch, gather, in_split, rows_of, single
from lightning_mue.callbacks.collect_trace import open_journal, record_batch
from lightning_mue.callbacks.decoding import SplitDecoder
from lightning_mue.callbacks.journal import Journal
from lightning_mue.callbacks.multi_exit_supervision import find_model
from lightning_mue.data import ShardsDataModule
from lightning_mue.exits import attached
from lightning_mue.inference.profile import device_name, measure_latency
from lightning_mue.latency import LatencyTable
from lightning_mue.policy import ExitPolicy
from lightning_mue.trace import Trace

SELECTION_REUSED = (
    "selection_reused: nothing says that this data did not choose the checkpoint; if it did, the promise is weaker."
)
INDEPENDENT = (
    "independent: no batch names clusters, so samples are taken as independent; if some share a picture, the promise "
    "is weaker."
)


class CalibrateExits(L.Callback):
    """Chooses exit thresholds that keep a promised quality, and proves it by decoding data kept for that.

    In ``validate`` and ``mue calibrate``: records the *propose* part of the validation data at full depth, measures a
    latency table, simulates all policies, decodes the best there, fixes a chain of them from safe to bold, and tests it
    in order by decoding the *certify* part. Writes ``policy.json`` beside the checkpoint. Inside ``fit`` it only
    simulates, on a few samples, and logs (with ``fit_samples`` > 0); that policy is marked uncertified, for that data
    chooses the checkpoint.

    Args:
        keep: fraction of the full-depth metric to keep, or for ``consistency`` of outputs to leave unchanged.
        metric: ``exact_match``, ``accuracy``, ``vqa_accuracy``, ``anls``, ``character_accuracy`` or ``consistency``; if
            not given, ``exact_match`` with ShardsDataModule or named ``references``, else ``consistency``, which needs
            none.
        confidence_level: of the promise.
        seed: of the certificate's one permutation.
        max_new_tokens: of each answer; the generation config's if not given.
        model: attribute of the LightningModule that holds the backbone; if not given, that of MultiExitSupervision in
            the same trainer, else ``model``.
        out: where the policy goes; ``policy.json`` beside the checkpoint if not given. Two instances in one trainer
            must name two files.
        folder: of the journal that lets an interrupted calibration go on; ``<default_root_dir>/calibration``.
        latency_repeats: of each measurement of the latency table.
        fit_samples: samples simulated at each validation inside ``fit``; 0 for none.
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
        confidence_level: float = 0.95,
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
        self.metric = metric or ""  # chosen when the data is known
        self.max_new_tokens, self.model, self.out, self.folder = max_new_tokens, model, out, folder
        self.latency_repeats, self.fit_samples = latency_repeats, fit_samples
        self.keys = BatchKeys(inputs, references, sample_id, cluster)
        self.policy: ExitPolicy | None = None
        self.proposal: Proposal | None = None
        self.tests: list[Tested] = []
        self.trace: Trace | None = None
        self.latency: LatencyTable | None = None
        self.decoder: SplitDecoder | None = None
        self._journal: Journal | None = None
        self._paths: list[Path] = []
        self._clusters: dict[str, str] = {}
        self._one: Batch | None = None
        self._seen, self._note = 0, ""
        self.check()

    def check(self) -> None:
        """Check the promise.

        Raises:
            ValueError: it cannot be made.
        """
        check_promise(self.keep, self.metric or "consistency", self.confidence_level)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the journal."""
        self._journal = None
        fitting = trainer.state.fn == TrainerFn.FITTING
        if trainer.sanity_checking or (fitting and not self.fit_samples):
            return
        model = find_model(trainer, pl_module, self.model)
        exits = attached(model)
        if exits is None or not exits.layers:
            raise ValueError("There are no exits to calibrate; call `attach_exits(model, config)` and train them.")
        if not self.metric:
            ours = isinstance(getattr(trainer, "datamodule", None), ShardsDataModule)
            self.metric = "exact_match" if ours or self.keys.references is not None else "consistency"
        self._journal = open_journal(trainer, model, self.metric, self.max_new_tokens, self.folder)
        self._paths, self._clusters, self._one, self._seen = [], {}, None, 0

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
        if self._journal is None:
            return
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting and self._seen >= self.fit_samples:
            return
        model = find_model(trainer, pl_module, self.model)
        self._note = "" if self.keys.names_clusters(batch) else INDEPENDENT
        batch = self.keys.read(batch, view(model).generate_inputs)
        self._seen += len(batch["sample_id"])
        certifies = in_split(trainer, batch, "certify")
        for row, certify_row in enumerate(certifies):
            if certify_row:
                self._clusters[batch["sample_id"][row]] = batch["cluster"][row]
        if self._one is None:
            self._one = single(batch, 0)
        chosen = batch if fitting else rows_of(batch, [not c for c in certifies])
        path = record_batch(trainer, model, chosen, self.metric, self.max_new_tokens, self._journal)
        self._paths += [path] if path is not None else []

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Propose, and outside of ``fit`` certify."""
        if self._journal is None:
            return
        model = find_model(trainer, pl_module, self.model)
        paths, clusters = sorted(set(gather(self._paths))), dict(gather(sorted(self._clusters.items())))
        fitting = trainer.state.fn == TrainerFn.FITTING
        if not paths or not (clusters or fitting):
            raise ValueError(
                f"Calibration needs samples to propose on and others to certify on (about 30 and 70 % of the clusters, "
                f"by a hash of their names); found {len(paths)} batches for the one and {len(clusters)} samples for "
                "the other. Give more validation data: `val` with a lower `select`, or a larger `holdout`."
            )
        self.trace = Trace.merge([Trace.load(p) for p in paths])
        self.latency = self._measure(trainer, model)
        self.proposal = propose(self.trace, self.latency, self.metric, self.keep, self.confidence_level)
        if fitting:
            self._log_simulation(pl_module)
            return
        self.policy = self._certify(trainer, model, list(clusters.values()))
        target = self._target(trainer)
        if trainer.is_global_zero:
            self.policy.save(target)
        assert self.policy.certificate is not None
        rank_zero_info(f"{self.policy.certificate.in_words()}\nPolicy: {self.policy.depths_in_words()} -> {target}")

    @property
    def state_key(self) -> str:
        """Name this instance's state by what it calibrates and where to; two in one trainer need two ``out``."""
        return self._generate_state_key(model=self.model, out=self.out)

    def state_dict(self) -> dict[str, Any]:
        """Return the policy as JSON text (checkpoints are read with ``weights_only=True``)."""
        return {"policy": self.policy.to_json()} if self.policy is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the policy back."""
        self.policy = ExitPolicy.from_json(state_dict["policy"], "the checkpoint's policy")

    def _measure(self, trainer: L.Trainer, model: Any) -> LatencyTable:
        """Measure once on rank 0; a resumed calibration uses the table it began with."""
        assert self._journal is not None
        setting = [device_name(next(model.parameters()).device), torch.get_num_threads(), self.latency_repeats]
        path = self._journal.path("latency", setting, ".json")
        if trainer.is_global_zero and not path.exists():
            assert self._one is not None
            one = {k: v for k, v in self._one.items() if hasattr(v, "to")}
            one = {k: v.to(next(model.parameters()).device) for k, v in one.items()}
            measure_latency(model, one, self.latency_repeats, self.max_new_tokens).save(path)
        trainer.strategy.barrier("latency")
        text = trainer.strategy.broadcast(path.read_text(encoding="utf-8") if trainer.is_global_zero else "")
        return LatencyTable.from_json(text, str(path))

    def _certify(self, trainer: L.Trainer, model: Any, clusters: list[str]) -> ExitPolicy:
        assert self._journal is not None
        assert self.proposal is not None
        full_score, distinct = self.proposal.full_depth.score, len(set(clusters))
        promise = (self.metric, self.keep, self.confidence_level)
        if not shortage(*promise, full_score, distinct, distinct < len(clusters)):
            self.proposal = self._rehearse(trainer, model)
        self.decoder = SplitDecoder(trainer, model, self.metric, self.max_new_tokens, self._journal, self.keys)
        settings = view(model).decode_settings(self.max_new_tokens)
        closed = list(getattr(getattr(trainer, "datamodule", None), "closed_answers", None) or [])
        precision = str(next(model.parameters()).dtype).removeprefix("torch.")
        decode = {**settings.plain, "answers": closed, "precision": precision, "batching": "per row"}
        notes = ["" if self._journal.key["data"] else SELECTION_REUSED, self._note]
        note = " ".join(note for note in notes if note)
        provenance = Provenance(fingerprint(model), self._journal.key["data"], decode, note)
        policy, self.tests = certify(
            self.proposal.chain,
            self.decoder,
            metric=self.metric,
            keep=self.keep,
            confidence_level=self.confidence_level,
            seed=self.seed,
            clusters=clusters,
            full_score_mean=full_score,
            provenance=provenance,
            on_tested=_announce,
        )
        return policy

    def _rehearse(self, trainer: L.Trainer, model: Any) -> Proposal:
        """Decode what simulation proposes on the data that it was proposed on."""
        assert self._journal is not None
        assert self.proposal is not None
        assert self.trace is not None
        decoder = SplitDecoder(trainer, model, self.metric, self.max_new_tokens, self._journal, self.keys, "propose")
        decoder(ExitPolicy.full_depth())
        return rehearse(self.proposal, self.trace, decoder)

    def _log_simulation(self, pl_module: L.LightningModule) -> None:
        assert self.proposal is not None
        full = self.proposal.full_depth
        safe = [c for c in self.proposal.chain if c.used <= 1] or [full]
        best = min(safe, key=lambda c: c.ms)
        self.policy = uncertified(best, self.metric, self.keep, self.confidence_level)
        pl_module.log("exits/simulated_speedup", full.ms / best.ms, rank_zero_only=False, sync_dist=True)
        for stream, depth in best.depths.items():
            pl_module.log(f"exits/simulated_depth_{stream}", depth, sync_dist=True)

    def _target(self, trainer: L.Trainer) -> Path:
        if self.out is not None:
            return Path(self.out)
        beside = Path(trainer.ckpt_path).parent if trainer.ckpt_path else Path(trainer.default_root_dir)
        return beside / "policy.json"


def _announce(tested: Tested) -> None:
    verdict = "passes" if tested.accepted else "fails"
    words = tested.candidate.policy.depths_in_words()
    rank_zero_info(f"p = {tested.result.p:.3g} {verdict}: {words} ({tested.candidate.ms:.2f} ms predicted)")
