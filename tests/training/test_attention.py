"""Which kernels train: open_clip's blocks call torch's attention, whatever a transformers config says."""

import pytest
import torch
from torch.profiler import profile
from torch.utils.data import DataLoader

from lightning_mue.training import MultiExitModule
from lightning_mue.training import module as module_file
from tests import zoo
from tests.training.test_module import trainer

FUSED = "aten::_scaled_dot_product_flash_attention_for_cpu"


@pytest.mark.parametrize(("attention", "fused"), [("eager", False), ("sdpa", True)])
def test_eager_writes_open_clips_attention_out(attention, fused, tmp_path, monkeypatch):
    kernels: set[str] = set()
    objective = module_file.objective

    def watched(*given):
        with profile() as found:
            losses = objective(*given)
        kernels.update(event.key for event in found.key_averages())
        return losses

    monkeypatch.setattr(module_file, "objective", watched)
    module = MultiExitModule(zoo.make("coca", exits=False), {"decoder": [3]}, attention=attention)
    batch = {**zoo.inputs("coca", 2), "labels": torch.randint(5, 90, (2, 6))}
    trainer(tmp_path, max_steps=1, enable_checkpointing=False).fit(module, DataLoader([batch], batch_size=None))
    assert (FUSED in kernels) == fused
