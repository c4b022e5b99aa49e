"""ONNX Runtime beside torch; that they agree is an invariant (tests/invariants), here is all else."""

import gc
import sys

import numpy as np
import pytest
import torch

from lightning_mue.backbones import view
from lightning_mue.inference import ExitEngine, fastest, runtime
from lightning_mue.inference.runtime import make_runtime
from lightning_mue.inference.sessions import StreamSessions, shared_sessions
from lightning_mue.policy import ExitPolicy
from tests import zoo
from tests.invariants.policies import STEPS, random_depths

FULL, INT8 = ExitPolicy.full_depth(), ExitPolicy(precision="int8")

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@torch.inference_mode()
def states(policy, name, tensors, depths):
    model = zoo.shared("florence2")
    out, executor = ExitEngine(model, policy, runtime=name).run(6, None, False, tensors, forced=depths)
    return out, torch.as_tensor(executor.states[:, :, : out.sequences.shape[1] - 1])


def test_8_bits_are_near_float32():
    tensors, depths = zoo.inputs("florence2", 3), [[5] * 6] * 3
    expected, right = states(FULL, "torch", tensors, depths)
    found, near = states(INT8, "onnxruntime", tensors, depths)
    same = min(found.sequences.shape[1], expected.sequences.shape[1]) - 1
    error = (near[1:, :, :1] - right[1:, :, :1]).abs()
    assert 1e-4 < error.max() < 0.5
    assert error.square().mean().sqrt() < 0.1 * right[1:, :, :1].square().mean().sqrt()
    assert same >= 1


@pytest.mark.parametrize("name", list(zoo.BACKBONES))
def test_8_bits_by_row_do_not_depend_on_the_batch(name):
    """To the last bit, in every layer of every stream; with one scale for all rows they do."""
    model, tensors, depths = zoo.shared(name), zoo.inputs(name, 4), random_depths(name, 4)
    depends = {}
    for precision in ("int8", "int8_rows"):
        engine = ExitEngine(model, ExitPolicy(precision=precision))
        out, executor = engine.run(STEPS, None, False, tensors, forced=depths)
        differences = 0
        for row in range(4):
            one = {key: tensor[row : row + 1] for key, tensor in tensors.items()}
            alone, by_itself = engine.run(STEPS, None, False, one, forced=depths[row : row + 1])
            reached = np.minimum(out.exit_depths["decoder"][row, :6], alone.exit_depths["decoder"][0, :6]).tolist()
            for position, depth in enumerate(reached):
                mine, single = executor.states[: depth + 1, row, position], by_itself.states[: depth + 1, 0, position]
                differences += int((mine != single).sum())
        depends[precision] = differences > 0
    assert depends == {"int8": True, "int8_rows": False}


def test_a_policy_in_8_bits_runs_where_it_can():
    engine = ExitEngine(zoo.shared("florence2"), INT8)
    assert engine.runtime == "onnxruntime"
    assert engine.generate(3, **zoo.inputs("florence2", 2)).sequences.shape == (2, 4)
    with pytest.raises(ValueError, match=r"asks for 'int8', which runtime 'torch' does not compute in; take \['onnx"):
        ExitEngine(zoo.shared("florence2"), INT8, runtime="torch")
    with pytest.raises(ValueError, match=r"asks for 'bfloat16', which runtime 'onnxruntime' does not"):
        ExitEngine(zoo.shared("florence2"), ExitPolicy(precision="bfloat16"), runtime="onnxruntime")
    with pytest.raises(ValueError, match=r"`runtime` must be one of \['torch', 'onnxruntime', 'auto'\], got 'jax'"):
        make_runtime("jax", view(zoo.shared("florence2")), None)


@pytest.mark.parametrize("sooner", ["torch", "onnxruntime"])
def test_auto_takes_what_is_faster(sooner, monkeypatch):
    """The clock is ours: a step of one of the two takes a second, of the other none."""
    now, step = [0.0], runtime._step

    def slowed(rival, backbone):
        taken = step(rival, backbone)

        def run():
            taken()
            now[0] += rival.name != sooner

        return run

    monkeypatch.setattr(runtime, "_step", slowed)
    monkeypatch.setattr(fastest.time, "perf_counter", lambda: now[0])
    engine = ExitEngine(zoo.shared("florence2"), FULL, runtime="auto")
    assert engine.runtime == sooner
    assert engine.generate(3, **zoo.inputs("florence2", 2)).sequences.shape == (2, 4)


@pytest.mark.parametrize("sooner", ["torch", "onnxruntime"])
def test_auto_takes_for_each_stream_what_is_faster(sooner, monkeypatch):
    model, tensors, now = zoo.shared("florence2"), zoo.inputs("florence2", 2), [0.0]
    engine = ExitEngine(model, FULL, runtime="auto")
    kinds = {"torch": type(engine.backbone.encoders[0]), "onnxruntime": StreamSessions}
    for rival in engine._runtime.streams[0]._rivals:
        monkeypatch.setattr(rival, "layer", slowed(rival.layer, now, not isinstance(rival, kinds[sooner])))
    monkeypatch.setattr(fastest.time, "perf_counter", lambda: now[0])
    expected = ExitEngine(model, FULL).generate(4, **tensors).sequences.tolist()
    assert engine.generate(4, **tensors).sequences.tolist() == expected
    assert isinstance(engine._runtime.streams[0].chosen, kinds[sooner])


def slowed(layer, now, is_slow):
    def run(k, state):
        now[0] += is_slow
        return layer(k, state)

    return run


def test_auto_takes_what_there_is(monkeypatch):
    model = zoo.shared("florence2")
    assert ExitEngine(model, INT8, runtime="auto").runtime == "onnxruntime"
    assert ExitEngine(model, ExitPolicy(precision="bfloat16"), runtime="auto").runtime == "torch"
    assert ExitEngine(zoo.make("florence2").bfloat16(), FULL, runtime="auto").runtime == "torch"
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert ExitEngine(zoo.make("florence2"), FULL, runtime="auto").runtime == "torch"


def test_models_that_compute_in_something_else_are_refused():
    model = zoo.make("florence2").bfloat16()
    with pytest.raises(ValueError, match=r"models in float32 on the CPU, got torch.bfloat16 on cpu"):
        ExitEngine(model, FULL, runtime="onnxruntime")


def test_engines_share_what_is_the_same():
    model = zoo.make("florence2")
    first = shared_sessions(view(model))
    assert shared_sessions(view(model)) is first
    assert shared_sessions(view(model), "int8") is not first
    with torch.no_grad():
        view(model).decoder.pieces(1).before.key.bias.add_(1)
    assert shared_sessions(view(model)) is not first
    twin = zoo.make("florence2")  # equal weights elsewhere: its head may be changed alone
    assert shared_sessions(view(twin)) is not first
    del first
    gc.collect()


@pytest.mark.parametrize("library", ["onnxruntime", "onnx", "onnxscript"])
def test_what_is_not_installed_is_named(library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=r"needs onnx, onnxscript and onnxruntime .*lightning-mue\[ort\]"):
        ExitEngine(zoo.make("florence2"), FULL, runtime="onnxruntime")
