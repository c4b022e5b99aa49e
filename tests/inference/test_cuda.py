"""The engine on a CUDA device; skipped where there is none."""

import pytest
import torch

from lightning_mue.inference import ExitEngine
from lightning_mue.inference.profile import measure_latency
from lightning_mue.policy import ExitPolicy, ExitRule
from tests import reference, zoo

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


@pytest.mark.parametrize("name", list(zoo.BACKBONES))
def test_full_depth_equals_generate(name):
    model = zoo.make(name).cuda()
    tensors = {k: v.cuda() for k, v in zoo.inputs(name, 4).items()}
    expected = reference.generate(model, tensors, max_new_tokens=14)
    found = ExitEngine(model, ExitPolicy.full_depth()).generate(**tensors, max_new_tokens=14, timings=True)
    assert found.sequences.tolist() == expected.tolist()
    assert found.timings["total"] > 0


@pytest.mark.parametrize("name", list(zoo.BACKBONES))
def test_exits_and_latency(name):
    model = zoo.make(name).cuda()
    tensors = {k: v.cuda() for k, v in zoo.inputs(name, 4).items()}
    for stream, layers in zoo.exit_layers(name).items():
        policy = ExitPolicy({stream: ExitRule("gate", layers, [0.5] * len(layers))})
        together = ExitEngine(model, policy).generate(**tensors)
        assert together.sequences.shape[0] == 4
    one = {k: v[:1] for k, v in tensors.items()}
    assert measure_latency(model, one, repeats=2).decoder.step_ms > 0
