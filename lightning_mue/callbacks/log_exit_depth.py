"""LogExitDepth: where samples and tokens leave under the current policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_mue.backbones import num_layers, view
from lightning_mue.callbacks.batch_keys import BatchKeys, Inputs
from lightning_mue.callbacks.batches import answer_constraint
from lightning_mue.callbacks.calibrate_exits import CalibrateExits
from lightning_mue.callbacks.multi_exit_supervision import find_model
from lightning_mue.callbacks.ranks import gather
from lightning_mue.exits import attached
from lightning_mue.inference import ExitEngine
from lightning_mue.policy import ExitPolicy


class LogExitDepth(L.Callback):
    """Logs exit depths at the end of each validation, of its first batches as the engine decodes them.

    ``exit_depth/<stream>`` is the mean over samples, in the decoder over tokens; ``exit_depth/<stream>_<layer>`` is the
    share that left after that exit, or ran all layers. It comes after CalibrateExits in ``callbacks``.

    Args:
        model: attribute of the LightningModule that holds the backbone; if not given, that of MultiExitSupervision in
            the same trainer, else ``model``.
        policy: a policy or the path of one; if not given, the latest of CalibrateExits, else full depth.
        batches: how many are decoded, on each rank.
        max_new_tokens: of each answer; if not given, as CalibrateExits, the policy or the generation config say.
        inputs: where batches hold the backbone's inputs; if not given, as CalibrateExits says.
    """

    def __init__(
        self,
        model: str | None = None,
        policy: ExitPolicy | str | None = None,
        batches: int = 4,
        max_new_tokens: int | None = None,
        inputs: Inputs = None,
    ) -> None:
        self.model, self.policy, self.batches = model, policy, batches
        self.max_new_tokens, self.inputs = max_new_tokens, inputs
        self._kept: list[dict[str, Any]] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Look whether the policy will be there when it is asked for."""
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(callback, CalibrateExits) for callback in callbacks[callbacks.index(self) :]):
            rank_zero_warn("LogExitDepth comes before CalibrateExits, so it logs the policy that was there before.")

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin anew."""
        self._kept = []

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the first batches until the policy is known."""
        if trainer.sanity_checking or len(self._kept) >= self.batches:
            return
        model = find_model(trainer, pl_module, self.model)
        calibration = self._calibration(trainer, pl_module, model)
        keys = BatchKeys(self.inputs) if self.inputs is not None or calibration is None else calibration.keys
        self._kept.append(keys.inputs_of(batch, view(model).generate_inputs))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Decode them and log."""
        if trainer.sanity_checking:
            return
        model = find_model(trainer, pl_module, self.model)
        exits, layers = attached(model), num_layers(view(model))
        for stream, counts in self._counts(trainer, pl_module, model).items():
            total = sum(counts)
            mean = sum(k * count for k, count in enumerate(counts)) / total
            pl_module.log(f"exit_depth/{stream}", mean, sync_dist=True)
            for k in (*(exits.layers.get(stream, ()) if exits is not None else ()), layers[stream]):
                pl_module.log(f"exit_depth/{stream}_{k}", counts[k] / total, sync_dist=True)
        self._kept = []

    def _counts(self, trainer: L.Trainer, pl_module: L.LightningModule, model: Any) -> dict[str, list[int]]:
        """Return, for each stream, how many left after layers 0, 1, ... to the last, on all ranks."""
        layers = num_layers(view(model))
        calibration = self._calibration(trainer, pl_module, model)
        policy = ExitPolicy.load(self.policy) if isinstance(self.policy, str) else self.policy
        limit = self.max_new_tokens
        if calibration is not None:
            policy, limit = policy or calibration.policy, limit or calibration.max_new_tokens
        if policy is None or policy.is_full_depth:  # nothing to decode for
            return {stream: [0] * last + [1] for stream, last in layers.items()}
        engine = ExitEngine(model, replace(policy, groups=None), check_fingerprint=False)
        prefix_fn = answer_constraint(trainer, engine.backbone.decode_settings(limit).end_ids[0])
        found = [engine.generate(limit, prefix_fn, **inputs).exit_depths for inputs in self._kept]
        mine = {stream: depth_counts([depths[stream] for depths in found], last) for stream, last in layers.items()}
        ranks = gather([mine])
        return {
            stream: [sum(of_layer) for of_layer in zip(*(r[stream] for r in ranks), strict=True)] for stream in mine
        }

    def _calibration(self, trainer: L.Trainer, pl_module: L.LightningModule, model: Any) -> CalibrateExits | None:
        """Return the last CalibrateExits of this model, or None."""
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        ours = [callback for callback in callbacks if isinstance(callback, CalibrateExits)]
        ours = [callback for callback in ours if find_model(trainer, pl_module, callback.model) is model]
        return ours[-1] if ours else None


def depth_counts(depths: Sequence[Tensor], last: int) -> list[int]:
    """Return how often the depths 0, 1, ... ``last`` occur in batches of exit depths; 0 is no depth, never counted."""
    flat = torch.cat([torch.zeros(0, dtype=torch.long), *(d.flatten().cpu() for d in depths)])
    return torch.bincount(flat[flat > 0], minlength=last + 1).tolist()
