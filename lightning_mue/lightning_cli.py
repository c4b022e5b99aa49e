"""LightningCLI with one more subcommand, ``calibrate``, as a method of a Trainer subclass."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info

from lightning_mue.callbacks import CalibrateExits
from lightning_mue.checkpoint import find_policy
from lightning_mue.data import ShardsDataModule
from lightning_mue.training import MultiExitModule


class MueTrainer(L.Trainer):
    """A Trainer that can calibrate exits."""

    def calibrate(
        self,
        model: L.LightningModule | None = None,
        dataloaders: Any = None,
        datamodule: L.LightningDataModule | None = None,
        ckpt_path: str | None = None,
        keep: float | None = None,
        metric: str | None = None,
        confidence_level: float | None = None,
    ) -> Any:
        """Collect, propose and certify on the calibration data; writes ``policy.json`` beside the checkpoint.

        Args:
            model: the module.
            dataloaders: validation loaders, instead of a data module.
            datamodule: the data.
            ckpt_path: checkpoint to calibrate.
            keep: fraction of the full-depth metric to keep; the recipe's CalibrateExits if not given.
            metric: ``exact_match``, ``accuracy`` or ``consistency``; likewise.
            confidence_level: of the promise; likewise.
        """
        callbacks: list[L.Callback] = self.callbacks  # type: ignore[attr-defined]
        ours = [c for c in callbacks if isinstance(c, CalibrateExits)]
        if not ours:
            ours = [CalibrateExits()]
            callbacks.append(ours[0])
        for callback in ours:
            for name, value in (("keep", keep), ("metric", metric), ("confidence_level", confidence_level)):
                if value is not None:
                    setattr(callback, name, value)
            callback.check()
        return self.validate(model, dataloaders, ckpt_path=ckpt_path, datamodule=datamodule, weights_only=True)


class MueCLI(LightningCLI):
    """LightningCLI with ``calibrate``, and ``--policy`` for ``test`` and ``predict``."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Add ``calibrate`` to Lightning's own."""
        hidden = {"model", "dataloaders", "datamodule"}
        return LightningCLI.subcommands() | {"calibrate": hidden}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--policy``, and checkpoints in ``trainer.default_root_dir``: ``best.ckpt`` and ``last.ckpt``."""
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.filename": "best",
                "checkpoint.monitor": "val/exact",
                "checkpoint.mode": "max",
                "checkpoint.save_last": True,
                "checkpoint.enable_version_counter": False,
            }
        )
        parser.link_arguments("trainer.default_root_dir", "checkpoint.dirpath")
        parser.add_argument("--policy", type=str | None, default=None, help="policy.json that test and predict obey")

    def before_instantiate_classes(self) -> None:
        """Use the machine's cores, unless the environment says otherwise."""
        torch.set_float32_matmul_precision("high")

    def before_test(self) -> None:
        """Obey the policy."""
        self._obey()

    def before_predict(self) -> None:
        """Obey the policy."""
        self._obey()

    def _obey(self) -> None:
        settings = self.config[self.subcommand]
        self.model.policy = find_policy(settings.policy, settings.ckpt_path)
        rank_zero_info(f"Policy: {self.model.policy.depths_in_words()}")


def run(args: Sequence[str] | ArgsType = None) -> MueCLI:
    """Run LightningCLI on ``args`` (subcommand first)."""
    given = None if args is None or list(args) == sys.argv[1:] else list(args)  # type: ignore[arg-type]
    return MueCLI(
        MultiExitModule,
        ShardsDataModule,
        trainer_class=MueTrainer,
        args=given,
        save_config_callback=SaveConfigCallback,
        save_config_kwargs={"overwrite": True},
    )
