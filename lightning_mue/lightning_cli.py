"""LightningCLI with one more subcommand, ``calibrate``, as a method of a Trainer subclass."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from lightning_mue.callbacks import CalibrateEmbeddings, CalibrateExits, LastCheckpoint, ObeyPolicy, WritePredictions
from lightning_mue.callbacks.ledger import Reuse
from lightning_mue.data import ShardsDataModule
from lightning_mue.nested_options import whole_parts
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
        reuse: Reuse | None = None,
    ) -> Any:
        """Collect, propose and certify on the calibration data; writes ``policy.json`` beside the checkpoint.

        Args:
            model: the module.
            dataloaders: validation loaders, instead of a data module.
            datamodule: the data.
            ckpt_path: checkpoint to calibrate.
            keep: fraction of the full-depth metric that answers keep; the recipe's CalibrateExits if not given.
            metric: ``exact_match``, ``accuracy``, ``vqa_accuracy``, ``anls``, ``character_accuracy`` or
                ``consistency``; likewise.
            confidence_level: of the promise; likewise.
            reuse: whether samples that have tested another chain of these weights are refused, or spend confidence;
                likewise.
        """
        callbacks: list[L.Callback] = self.callbacks  # type: ignore[attr-defined]
        ours = [c for c in callbacks if isinstance(c, (CalibrateExits, CalibrateEmbeddings))]
        if not ours:
            ours = [CalibrateExits()]
            callbacks.append(ours[0])
        of_all = {"confidence_level": confidence_level, "reuse": reuse}
        of_answers = {"keep": keep, "metric": metric}
        if (keep or metric) and not any(isinstance(callback, CalibrateExits) for callback in ours):
            raise ValueError(
                "`keep` and `metric` are of CalibrateExits, and there is none; set CalibrateEmbeddings' own."
            )
        for callback in ours:
            given = of_all | of_answers if isinstance(callback, CalibrateExits) else of_all
            for name, value in given.items():
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
                "checkpoint.enable_version_counter": False,
            }
        )
        parser.add_lightning_class_args(LastCheckpoint, "last_checkpoint")
        for name in ("checkpoint", "last_checkpoint"):
            parser.link_arguments("trainer.default_root_dir", f"{name}.dirpath")
        parser.add_argument("--policy", type=str | None, default=None, help="policy.json that test and predict obey")
        parser.add_argument(
            "--threads", type=int | None, default=None, help="CPU threads of torch; None leaves its own"
        )

    def before_instantiate_classes(self) -> None:
        """Set the number of threads: small models are fastest on one, and suffer when others share the cores."""
        if (threads := self.config[self.subcommand].threads) is not None:
            torch.set_num_threads(threads)
            os.environ["OMP_NUM_THREADS"] = str(threads)  # else Lightning's launcher of several processes chooses

    def before_validate(self) -> None:
        """Look for the checkpoint."""
        self._check_checkpoint()

    def before_calibrate(self) -> None:
        """Look for the checkpoint."""
        self._check_checkpoint()

    def before_test(self) -> None:
        """Look for the checkpoint and obey the policy."""
        self._check_checkpoint()
        self._add(ObeyPolicy(self.config[self.subcommand].policy))

    def before_predict(self) -> None:
        """Look for the checkpoint, obey the policy and write the answers."""
        self._check_checkpoint()
        self._add(ObeyPolicy(self.config[self.subcommand].policy), WritePredictions())

    def _add(self, *callbacks: L.Callback) -> None:
        self.trainer.callbacks.extend(callbacks)  # type: ignore[attr-defined]

    def _check_checkpoint(self) -> None:
        """Refuse ``last`` where there is none: Lightning would only warn and go on with random weights."""
        keeper = self.trainer.checkpoint_callback
        folder = getattr(keeper, "dirpath", None)
        if self.config[self.subcommand].ckpt_path != "last" or folder is None:
            return
        if not any(Path(folder).glob("last*.ckpt")):
            raise FileNotFoundError(
                f"`ckpt_path` is 'last' and {folder} holds no last.ckpt: run `mue fit` first, or name a checkpoint "
                "with --ckpt_path"
            )


def run(args: Sequence[str] | None = None) -> MueCLI:
    """Run LightningCLI on ``args`` (subcommand first)."""
    whole = whole_parts(sys.argv[1:] if args is None else list(map(str, args)))
    given = None if whole == sys.argv[1:] else whole
    with warnings.catch_warnings():
        # We do call it from Python on purpose, when quickstart and tests do.
        warnings.filterwarnings("ignore", "LightningCLI's args parameter is intended")
        return MueCLI(
            MultiExitModule,
            ShardsDataModule,
            trainer_class=MueTrainer,
            args=given,
            save_config_callback=SaveConfigCallback,
            save_config_kwargs={"overwrite": True},
        )
