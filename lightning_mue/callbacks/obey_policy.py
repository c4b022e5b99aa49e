"""ObeyPolicy: ``test`` and ``predict`` decode under a policy."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_mue.inference import ExitEngine
from lightning_mue.policy import ExitPolicy
from lightning_mue.policy_file import find_policy


class ObeyPolicy(L.Callback):
    """Gives ``test`` and ``predict`` the policy of ``--policy``, else the one beside the checkpoint, else full depth.

    A policy that is named must fit the weights; one that only lies there and does not is left alone, with a warning.

    Args:
        path: policy.json, or None.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Obey; only now are the checkpoint's weights in the module."""
        self._obey(trainer, pl_module)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Obey."""
        self._obey(trainer, pl_module)

    def _obey(self, trainer: L.Trainer, pl_module: Any) -> None:
        checkpoint = trainer.ckpt_path
        policy = find_policy(self.path, str(checkpoint) if checkpoint else None)
        try:
            ExitEngine(pl_module.model, policy)
        except ValueError as error:
            if self.path is not None:
                raise
            rank_zero_warn(f"The policy beside {checkpoint} is not obeyed, going on at full depth: {error}")
            policy = ExitPolicy.full_depth()
        _compare_precision(policy, trainer, pl_module.model)
        pl_module.policy = policy
        rank_zero_info(f"Policy: {policy.depths_in_words()}")


def _compare_precision(policy: ExitPolicy, trainer: L.Trainer, model: Any) -> None:
    """Warn if the run's precision is not the one that was certified."""
    certified = policy.certificate.decode.get("precision") if policy.certificate is not None else None
    found = str(next(model.parameters()).dtype).removeprefix("torch.")
    if certified is not None and (found != certified or "mixed" in str(trainer.precision)):
        rank_zero_warn(
            f"The policy was certified in {certified}, this run uses {found} under precision {trainer.precision}: "
            "the promise does not hold for it."
        )
