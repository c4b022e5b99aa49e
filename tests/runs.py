"""A tiny recipe, tiny shards and a fitted checkpoint, for tests that type what a user types."""

import json
import os
import shutil
import signal
import sys
import tarfile
from pathlib import Path
from unittest.mock import patch

import lightning as L
import pytest
import yaml

from lightning_mue.cli import main
from lightning_mue.data.scenes import write_scenes
from tests import steady

ROOT = Path(__file__).resolve().parents[1]
PICTURES = {"train": 60, "val": 90, "test": 8}


class PowerCut(Exception):
    """What stops a run in a test."""


class StopOnce(L.Callback):
    """Ends training after so many steps, the first time only: a recipe with it is one command, run twice."""

    def __init__(self, step: int, marker: str, how: str = "raise") -> None:
        self.step, self.marker, self.how = step, Path(marker), how

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step and not self.marker.exists():
            self.marker.write_text("stopped")
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyboardInterrupt if self.how == "interrupt" else PowerCut


def tiny_recipe(path, shards, root, callbacks=None, **data):
    """Write ``recipes/quickstart.yaml`` with everything made small."""
    recipe = yaml.safe_load((ROOT / "recipes" / "quickstart.yaml").read_text())
    backbone = recipe["model"]["backbone"]
    backbone["text_config"] |= {"vocab_size": 300, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3}
    backbone["text_config"] |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    backbone["vision_config"] |= {"depths": [2], "embed_dim": [32], "projection_dim": 32}
    backbone["generation_config"]["max_new_tokens"] = 4
    recipe["model"]["exits"] = {"vision": [1], "encoder": [1], "decoder": [1, 2], "adapter_width": 8, "gate_width": 8}
    recipe["data"] |= {"train": str(shards), "val": str(shards), "test": str(shards), "image_size": 24}
    recipe["data"] |= {
        "vocab_size": 300,
        "batch_size": 16,
        "eval_batch_size": 32,
        "select": 0.2,
        "questions_per_picture": 2,
    } | data
    calibrate = {"keep": 0.6, "metric": "consistency", "latency_repeats": 2}
    recipe["trainer"] |= {
        "max_steps": 20,
        "val_check_interval": 6,
        "accelerator": "cpu",
        "default_root_dir": str(root),
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [{"class_path": "lightning_mue.callbacks.CalibrateExits", "init_args": calibrate}]
        if callbacks is None
        else callbacks,
    }
    Path(path).write_text(yaml.safe_dump(recipe))
    return str(path)


def mue(*args):
    """Run ``mue`` in this process, as if it had been typed."""
    args = [str(arg) for arg in args]
    with patch.object(sys, "argv", ["mue", *args]):
        main(args)


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    for split, count in PICTURES.items():
        write_scenes(folder, count, 0, split, 24, progress=False)
    return folder


@pytest.fixture(scope="session")
def fitted_once(tmp_path_factory, shards):
    """A folder with ``recipe.yaml`` and the checkpoints of an uninterrupted ``mue fit``."""
    folder = tmp_path_factory.mktemp("fitted")
    mue("fit", "-c", tiny_recipe(folder / "recipe.yaml", shards, folder))
    return folder


@pytest.fixture(scope="session")
def calibrated_once(tmp_path_factory, fitted_once):
    """The same after ``mue calibrate`` and ``mue freeze``."""
    folder = copy_run(fitted_once, tmp_path_factory.mktemp("calibrated") / "run")
    with steady.clock():
        mue("calibrate", "-c", folder / "recipe.yaml")
    mue("freeze", "--ckpt_path", folder / "last.ckpt", "--out", folder / "bundle")
    return folder


@pytest.fixture
def fitted(fitted_once, tmp_path):
    """A copy that a test may change; ``recipe.yaml`` writes into it."""
    return copy_run(fitted_once, tmp_path / "run")


@pytest.fixture
def calibrated(calibrated_once, tmp_path):
    return copy_run(calibrated_once, tmp_path / "run")


def copy_run(folder, to):
    shutil.copytree(folder, to)
    recipe = yaml.safe_load((to / "recipe.yaml").read_text())
    recipe["trainer"]["default_root_dir"] = str(to)
    (to / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return to


def members_of(shard):
    """The files of a tar, by name."""
    with tarfile.open(shard) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def policy_file(path, **changes):
    """Write a policy as JSON, whatever it says."""
    nothing = {"groups": None, "fingerprint": None, "certificate": None}
    plain = {"schema": 2, "rules": {}, "kv_fill": "just-in-time"} | nothing
    Path(path).write_text(json.dumps(plain | changes))
    return path
