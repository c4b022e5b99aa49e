"""MultiExitModule: a backbone with exits, trained with deep supervision."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torchmetrics.classification import BinaryAUROC

from lightning_mue.backbones import backbone_config, build_backbone, view
from lightning_mue.exits import ExitConfig, Exits, attach_exits, attached, exits_on_the_way
from lightning_mue.inference import ExitEngine, ExitOutput
from lightning_mue.inference.rows import groups_of
from lightning_mue.metrics.answers import AnswerScore
from lightning_mue.policy import ExitPolicy
from lightning_mue.signals import similarity
from lightning_mue.training.attention import Attention, attention, set_attention
from lightning_mue.training.depths import sample_step
from lightning_mue.training.gates import decoder_gate_logits
from lightning_mue.training.losses import Weighting
from lightning_mue.training.objective import Objective, objective
from lightning_mue.training.pairs import Pairs, check_contrast
from lightning_mue.training.shortlist import FirstLabels, begin_shortlist
from lightning_mue.training.start import Learners, let_learn, take_weights
from lightning_mue.training.supervised import IGNORE, Supervised, supervise
from lightning_mue.training.supervision import Supervision

Batch = dict[str, Any]


class MultiExitModule(L.LightningModule):
    """Trains all exits of a vision-language model together.

    Batches hold the backbone's own inputs and ``labels [B, T]`` (-100 at padding); see ``ShardsDataModule``.

    Args:
        backbone: a folder or hub name, a config as a mapping with ``model_type`` (random weights), or a module.
        exits: which layers become exits.
        learning_rate: peak of AdamW's; warms up linearly, then falls along a cosine to 0.
        gate_learning_rate: the same for the gates, which are small, begin from nothing and disturb nobody.
        weight_decay: of AdamW, on matrices but the gates'.
        warmup_steps: of the learning rate.
        weighting: of the decoder exits' losses: ``avg+last`` (DEED), ``sum`` (MuE), ``linear`` (CALM).
        early_probability: that a stream before the decoder is left at a random exit in a step.
        early_after: share of the training after which ``early_probability``, ``own_path`` and ``propagate`` begin.
        gate_weight: weight of the gates' loss; their inputs are detached, so they cost the backbone nothing.
        gate_balance: safe and unsafe states weigh the same in the gates' loss.
        own_path: share of steps in which the decoder's gates learn along the model's own greedy output instead of the
            references; such a step decodes.
        distill: weight of the KL divergence from the last exit's distribution to each earlier decoder exit's.
        distill_temperature: of both distributions (Hinton et al., 2015).
        contrast: weight of the contrastive loss, for a backbone that compares pictures with texts (CoCa: 0.5).
        propagate: share of steps in which every target position leaves the decoder at a random exit and deeper layers
            read the state it left with, as under K/V fill ``propagate`` (CALM).
        init_from: checkpoint whose weights training begins with, wherever name and shape are the same (another task,
            other exits); the optimizer begins anew.
        learns: ``all``; ``exits`` alone, for a backbone that must stay as it is; or their ``gates`` alone.
        attention: how training computes attention: ``eager``, written out (fastest under bf16 on CPUs), or ``sdpa``;
            evaluation always uses ``sdpa``. BLIP knows the first alone.
        seed: of all that is drawn for a step.
    """

    def __init__(
        self,
        backbone: str | dict[str, Any] | nn.Module,
        exits: ExitConfig | dict[str, Any],
        learning_rate: float = 5e-4,
        gate_learning_rate: float = 3e-3,
        weight_decay: float = 0.01,
        warmup_steps: int = 100,
        weighting: Weighting = "avg+last",
        early_probability: float = 0.25,
        early_after: float = 0.3,
        gate_weight: float = 1.0,
        gate_balance: bool = True,
        own_path: float = 0.0,
        distill: float = 0.0,
        distill_temperature: float = 1.0,
        contrast: float = 0.0,
        propagate: float = 0.0,
        init_from: str | None = None,
        learns: Learners = "all",
        attention: Attention = "sdpa",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model: Any = build_backbone(backbone)
        config = ExitConfig.of(exits)
        self.save_hyperparameters(ignore=["backbone", "exits", "init_from"])
        # Plain values only: checkpoints are read with weights_only=True.
        self.save_hyperparameters({"backbone": backbone_config(self.model), "exits": config.to_dict()})
        named = [f.name for f in fields(Supervision) if f.name in self.hparams]
        self.supervision = Supervision(**{name: self.hparams[name] for name in named})
        attach_exits(self.model, config)
        let_learn(self.model, learns)
        self.backbone = view(self.model)
        self.policy = ExitPolicy.full_depth()
        self._engine: ExitEngine | None = None
        self._score = AnswerScore("exact_match")
        signals = ("gate", "similarity") if config.gate else ("similarity",)
        self._auroc: Any = nn.ModuleDict({f"{s}_{k}": BinaryAUROC() for k in config.decoder for s in signals})
        check_contrast(self.supervision, self.backbone, self.exits)
        self._pairs = Pairs(self.backbone, self.exits) if self.supervision.contrast else None
        self._first_labels: FirstLabels | None = None
        self._init_from = init_from

    def setup(self, stage: str) -> None:
        """Take over the weights to begin with; a checkpoint that a run goes on from is read later and wins."""
        if stage == "fit" and self._init_from is not None:
            left = take_weights(self, self._init_from, getattr(self.trainer, "datamodule", None))
            rank_zero_info(f"init_from: {len(left)} of {len(self.state_dict())} weights begin anew {left[:3]}")

    def on_train_start(self) -> None:
        """Make the shortlist of the training labels."""
        datamodule = getattr(self.trainer, "datamodule", None)
        if self.supervision.own_path and getattr(datamodule, "closed_answers", None):
            raise ValueError("`own_path` decodes freely, but answers are closed here; set it to 0.")
        vocab_size, step = self.backbone.decoder.vocab_size, self.trainer.global_step
        self._first_labels = begin_shortlist(self.exits, vocab_size, datamodule, step)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Deep supervision; some steps leave streams early, copy states or decode for the gates."""
        if self._first_labels is not None:
            self._first_labels.see(batch["labels"])
        progress = self.trainer.global_step / max(1, self._total_steps)
        layers = exits_on_the_way(self.backbone, self.exits)
        step = sample_step(self.supervision, layers, self.trainer.global_step, progress)
        with attention(self.hparams["attention"]):
            losses: Objective = objective(self.backbone, self.exits, batch, batch["labels"], step, self.supervision)
        self.log("train/loss", losses.total)
        self.log("train/gates", losses.gates)
        if losses.by_exit:
            self.log("train/loss_full_depth", losses.by_exit[self.backbone.decoder.num_layers], prog_bar=True)
        if self.supervision.distill:
            self.log("train/distill", losses.distill)
        for k, loss in losses.contrast.items():
            self.log(f"train/contrast_{k}", loss)
        return losses.total

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log quality at every exit: ``val/<stream>_<layer>/exact`` is the share of answers that are wholly right.

        Plain greedy decoding gives the first reference exactly if and only if every teacher-forced arg-max along it is
        right, so nothing needs to be decoded. ``val/exact`` and ``val/loss`` are full depth. ``gate_auroc`` and
        ``similarity_auroc`` of a decoder exit say how well these signals tell where it agrees with the last layer
        along the references (nan if it always does or never).
        """
        labels_BT, last = batch["labels"], self.backbone.decoder.num_layers
        options: dict[str, Mapping[str, int]] = {}
        for stream in self.backbone.encoders:
            layers = self.exits.layers.get(stream.name, ())
            options |= {f"{stream.name}_{k}/": {stream.name: k} for k in layers}
        found = supervise(self.backbone, self.exits, batch, labels_BT, {})
        results = {"" if k == last else f"decoder_{k}/": result for k, result in found.results.items()}
        passes = {"": found}
        for name, depths in options.items():
            passes[name] = supervise(self.backbone, self.exits, batch, labels_BT, depths, [last])
            results[name] = passes[name].last
        for name, result in results.items():
            exact = _all_right(result.tokens_N, labels_BT).float().mean()
            size, on_bar = len(labels_BT), name == ""
            self.log(f"val/{name}loss", result.loss, batch_size=size, sync_dist=True)
            self.log(f"val/{name}exact", exact, batch_size=size, sync_dist=True, prog_bar=on_bar)
        self._see_signals(found)
        if self._pairs is not None:
            start_id = self.backbone.decode_settings(None).start_id
            self._pairs.see(self.backbone, self.exits, passes, labels_BT, start_id)

    def on_validation_epoch_end(self) -> None:
        """Log how well signals tell where the decoder's exits agree with the last layer."""
        for name, metric in self._auroc.items():
            signal, k = name.split("_")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # one class alone, which gives 0
                value = metric.compute()
            metric.reset()
            self.log(f"val/decoder_{k}/{signal}_auroc", value if value > 0 else value * math.nan, sync_dist=True)
        if self._pairs is not None:
            self.log_dict({f"val/{what}": value for what, value in self._pairs.results().items()})

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Decode under ``self.policy`` and log exact match and mean exit depths."""
        output = self._generate(batch)
        texts = self._processor.decode(output.sequences[:, 1:])
        self._score.update(texts, batch["references"])
        self.log("test/exact_match", self._score, batch_size=len(texts))
        for stream, depth in output.exit_depths.items():
            self.log(f"test/depth_{stream}", depth[depth > 0].float().mean(), batch_size=len(texts), sync_dist=True)

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """Decode under ``self.policy``; one mapping per sample with ``sample_id``, ``prompt`` and ``answer``."""
        texts = self._processor.decode(self._generate(batch).sequences[:, 1:])
        return [
            {"sample_id": i, "prompt": p, "answer": t}
            for i, p, t in zip(batch["sample_id"], batch["prompt"], texts, strict=True)
        ]

    def configure_optimizers(self) -> Any:
        """AdamW; decay on the matrices but the gates'; linear warm-up and cosine."""
        gates = [p for p in self.exits.gates.parameters() if p.requires_grad]
        apart = {id(p) for p in gates}
        rest = [p for p in self.parameters() if p.requires_grad and id(p) not in apart]
        groups = [
            {"params": [p for p in rest if p.ndim >= 2], "weight_decay": self.hparams["weight_decay"]},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
            {"params": gates, "weight_decay": 0.0, "lr": self.hparams["gate_learning_rate"]},
        ]
        # Under mixed precision Lightning clips gradients only for optimizers that do not unscale them themselves.
        fused = self.trainer.precision in ("32-true", "bf16-true")
        optimizer = torch.optim.AdamW(groups, lr=self.hparams["learning_rate"], betas=(0.9, 0.98), fused=fused)
        warmup = self.hparams["warmup_steps"]

        def rate(step: int) -> float:
            rise = min(1.0, (step + 1) / max(1, warmup))
            # Not before the first step: asking for their number loads the training data, and what is loaded before
            # Lightning restores its loops begins its epoch anew when a run is resumed.
            done = min(1.0, step / max(1, self._total_steps)) if step else 0.0
            return rise * 0.5 * (1 + math.cos(math.pi * done))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_epoch_start(self) -> None:
        """Use the attention that trains fastest; a frozen backbone has no dropout that gates should learn from."""
        if self.hparams["learns"] == "gates":
            self.model.eval()
        set_attention(self.model, self.hparams["attention"])

    def on_validation_model_eval(self) -> None:
        """Evaluate with the attention that inference uses."""
        super().on_validation_model_eval()
        set_attention(self.model, "sdpa")

    def on_validation_model_train(self) -> None:
        """Go back to the training attention, if training goes on."""
        super().on_validation_model_train()
        if self.trainer.state.fn == TrainerFn.FITTING:
            set_attention(self.model, self.hparams["attention"])

    def on_train_end(self) -> None:
        """Leave the model as inference uses it."""
        set_attention(self.model, "sdpa")

    @property
    def exits(self) -> Exits:
        """The exits, a submodule of the backbone (a property, so that they are registered once)."""
        exits = attached(self.model)
        assert exits is not None
        return exits

    @property
    def _total_steps(self) -> float:
        steps = self.trainer.estimated_stepping_batches
        if steps == math.inf:
            raise ValueError("The schedule needs an end: give the Trainer `max_steps` or `max_epochs`.")
        return steps

    @property
    def _processor(self) -> Any:
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        if not hasattr(datamodule, "processor"):
            raise ValueError("`test` and `predict` need a data module with a `processor`, such as ShardsDataModule.")
        return datamodule.processor

    def _see_signals(self, found: Supervised) -> None:
        """Add a pass's scores, all in [0, 1], and agreements."""
        logits = decoder_gate_logits(self.backbone, self.exits, found) if self.exits.config.gate else {}
        for k, logits_N in logits.items():
            self._auroc[f"gate_{k}"].update(logits_N.float().sigmoid(), found.agrees(k))
        for k in self.exits.layers.get("decoder", ()):
            h_ND, before_ND = (found.states[i][found.counts_BT] for i in (k, k - 1))
            cosine_N = similarity(h_ND[:, None], before_ND[:, None])
            self._auroc[f"similarity_{k}"].update((cosine_N.clamp(-1, 1) + 1) / 2, found.agrees(k))

    def _generate(self, batch: Batch) -> ExitOutput:
        """Decode under the policy, closed answers only where the data module has them."""
        if self._engine is None or self._engine.policy is not self.policy:  # lower precision copies the model
            self._engine = ExitEngine(self.model, self.policy, check_fingerprint=False)
        engine = self._engine
        constrain = getattr(getattr(self.trainer, "datamodule", None), "answer_constraint", None)
        end_id = engine.backbone.decode_settings(None).end_ids[0]
        allowed = constrain(end_id) if constrain else None
        return engine.generate(prefix_allowed_tokens_fn=allowed, groups=groups_of(self.policy, batch), **batch)


def _all_right(tokens_N: Tensor, labels_BT: Tensor) -> Tensor:
    """Return ``[B]``: every counted position of the row is right."""
    counts = labels_BT != IGNORE
    right_BT = torch.ones_like(counts)
    right_BT[counts] = tokens_N == labels_BT[counts]
    return right_BT.all(1)
