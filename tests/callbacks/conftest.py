"""A project that is not ours: a plain LightningModule around a model with exits, and plain loaders."""

from functools import partial

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from tests import zoo

SAMPLES, BATCH, TOKENS = 60, 12, 4


class Foreign(Dataset):
    """Tensors, a name and a cluster: no references, no labels, nothing of our data module."""

    def __init__(self, count=SAMPLES, seed=0, prefix="s"):
        self.inputs, self.prefix = zoo.inputs("florence2", count, seed), prefix

    def __len__(self):
        return len(self.inputs["input_ids"])

    def __getitem__(self, index):
        name = f"{self.prefix}{index:03d}"
        return {k: v[index] for k, v in self.inputs.items()} | {"sample_id": name, "cluster": name}


class Plain(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = zoo.make("florence2")

    def training_step(self, batch, batch_idx):
        return sum(p.sum() for p in self.model.mue_exits.gates.parameters()) * 1e-6

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


@pytest.fixture
def module():
    return Plain()


@pytest.fixture
def make_loader():
    return lambda *args: DataLoader(Foreign(*args), BATCH)


def trainer_in(folder, *callbacks, **options):
    """A quiet trainer of two steps, unless told otherwise."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "logger": False}
    keep = {"enable_checkpointing": False, "num_sanity_val_steps": 0, "max_steps": 2, "devices": 1}
    root = {"default_root_dir": folder / "run"}
    return L.Trainer(callbacks=list(callbacks), **(root | quiet | keep | options))


@pytest.fixture
def make_trainer(tmp_path):
    return partial(trainer_in, tmp_path)
