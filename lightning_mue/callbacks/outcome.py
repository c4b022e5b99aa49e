"""What the calibration callbacks have in common: when they run, what they refuse, and where their result goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from lightning_mue.calibration import Proposal, Tested
from lightning_mue.callbacks.calibration import Calibration
from lightning_mue.policy import ExitPolicy
from lightning_mue.policy_file import POLICY

INDEPENDENT = (
    "independent: no batch names clusters, so samples are taken as independent; if some share a picture, the promise "
    "is weaker."
)


class Calibrates(L.Callback):
    """What a trainer's calibration callbacks see of one another, and what a checkpoint keeps of each.

    Attributes:
        calibration: that is under way; None if there is none.
        policy: that came of the last one.
        model: attribute that holds the backbone.
        out: where the policy goes; beside the checkpoint if not given.
        file: its name there.
    """

    calibration: Calibration | None = None
    policy: ExitPolicy | None
    model: str | None
    out: str | None
    file: str = POLICY

    @property
    def state_key(self) -> str:
        """Name this instance's state by what it calibrates and where to; two in one trainer need two ``out``."""
        return self._generate_state_key(model=self.model, out=self.out or self.file)

    def state_dict(self) -> dict[str, Any]:
        """Return the policy as JSON text (checkpoints are read with ``weights_only=True``)."""
        return {"policy": self.policy.to_json()} if self.policy is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the policy back."""
        self.policy = ExitPolicy.from_json(state_dict["policy"], "the checkpoint's policy")


def intents_beside(trainer: L.Trainer, mine: Calibrates) -> list[str]:
    """Return what the trainer's other calibrations ask for at the same time."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    others = [cb.calibration for cb in callbacks if isinstance(cb, Calibrates) and cb is not mine]
    return [other.intent for other in others if other is not None]


def refuse_nothing(stage: str, calibration: Calibration | None) -> None:
    """Refuse to end without a policy: Lightning passes over validation without data, and over all its hooks.

    Raises:
        ValueError: nothing was calibrated.
    """
    if stage == "validate" and calibration is None:
        raise ValueError("Nothing was calibrated: no validation data. Give some, and no `limit_val_batches` of 0.")


def refuse_one_part(proposing: int, of_what: str, certifying: int) -> None:
    """Refuse data of which either part is empty.

    Raises:
        ValueError: how much there is.
    """
    if not proposing or not certifying:
        raise ValueError(
            f"Calibration needs samples to propose on and others to certify on (about 30 and 70 % of the clusters, "
            f"by a hash of their names); found {proposing} {of_what} for the one and {certifying} samples for "
            "the other. Give more validation data: `val` with a lower `select`, or a larger `holdout`."
        )


def log_result(
    pl_module: L.LightningModule, name: str, policy: ExitPolicy, proposal: Proposal, tests: Sequence[Tested]
) -> None:
    """Log what was tested of the policy chosen, to whatever logger there is, as ``<name>/speedup`` and so on."""
    plain = replace(policy, certificate=None)
    chosen = next((test for test in tests if test.candidate.policy == plain), None)
    if chosen is None:
        return
    figures = {"speedup": proposal.full_depth.ms / chosen.candidate.ms, "p_value": chosen.result.p}
    figures |= {f"kept_{e.promise.metric}": e.kept for e in chosen.evidence if e.kept is not None and not e.group}
    for figure, value in figures.items():
        pl_module.log(f"{name}/{figure}", value, sync_dist=True)


def write_policy(trainer: L.Trainer, policy: ExitPolicy, mine: Calibrates) -> None:
    """Write the policy to where the callback says, and say what it promises."""
    beside = Path(trainer.ckpt_path).parent if trainer.ckpt_path else Path(trainer.default_root_dir)
    target = Path(mine.out) if mine.out is not None else beside / mine.file
    if trainer.is_global_zero:
        policy.save(target)
    assert policy.certificate is not None
    rank_zero_info(f"{policy.certificate.in_words()}\nPolicy: {policy.depths_in_words()} -> {target}")
