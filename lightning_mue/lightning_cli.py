"""LightningCLI with one more subcommand, ``calibrate``, as a method of a Trainer subclass."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_mue.callbacks import CalibrateExits
from lightning_mue.callbacks.batches import gather
from lightning_mue.checkpoint import find_policy
from lightning_mue.data import ShardsDataModule
from lightning_mue.files import write_text
from lightning_mue.inference import ExitEngine
from lightning_mue.policy import ExitPolicy
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
            callback.trace = None
        found = self.validate(model, dataloaders, ckpt_path=ckpt_path, datamodule=datamodule, weights_only=True)
        if any(callback.trace is None for callback in ours):
            raise ValueError(
                "Nothing was calibrated: there was no validation batch. Give validation data, and no "
                "`limit_val_batches` of 0."
            )
        return found


class LastCheckpoint(ModelCheckpoint):
    """Keeps ``last.ckpt``: written at every validation and at the end of training, so that ``ckpt_path: last`` goes on.

    Lightning's own ``save_last`` writes it only when the best one changes, and not after the last validation.

    Args:
        dirpath: folder.
    """

    def __init__(self, dirpath: str | None = None) -> None:
        super().__init__(dirpath, filename="last", enable_version_counter=False)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save the very last step here: after it Lightning counts the epoch as over, even in its midst."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.global_step == trainer.max_steps:
            self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the steps since the last validation."""
        self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        if self.dirpath is not None and self._last_global_step_saved != trainer.global_step:
            self._save_checkpoint(trainer, str(Path(self.dirpath) / "last.ckpt"))


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
        pl_module.policy = policy
        rank_zero_info(f"Policy: {policy.depths_in_words()}")


class WritePredictions(L.Callback):
    """Writes what ``predict`` found to ``predictions.jsonl`` in ``trainer.default_root_dir``, in order of sample id."""

    def __init__(self) -> None:
        self._rows: dict[str, dict[str, Any]] = {}

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the rows; a sample that came twice counts once."""
        self._rows |= {row["sample_id"]: row for row in outputs}

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the rows of all ranks."""
        rows = dict(gather(list(self._rows.items())))
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / "predictions.jsonl"
            write_text(path, "".join(json.dumps(rows[name]) + "\n" for name in sorted(rows)))
            rank_zero_info(f"{len(rows)} predictions -> {path}")


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


def run(args: Sequence[str] | ArgsType = None) -> MueCLI:
    """Run LightningCLI on ``args`` (subcommand first)."""
    given = None if args is None or list(args) == sys.argv[1:] else list(args)  # type: ignore[arg-type]
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
