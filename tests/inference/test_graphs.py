"""Graphs of modules: the numbers of the modules they were made of, for every layer and size."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from lightning_mue.backbones import view
from lightning_mue.inference import graphs, quantise
from lightning_mue.inference.graphs import Graphs, with_weights
from tests import zoo

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def run(graph, *tensors):
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    return session.run(None, dict(zip(names, (t.numpy() for t in tensors), strict=True)))


def outputs(module, *tensors):
    found = module(*tensors)
    return [t.numpy() for t in (found if isinstance(found, tuple) else (found,))]


def examples(name, width, seed, n=3):
    g = torch.Generator().manual_seed(seed)
    shape = (n, n + 2, width) if name == "memory" else (n, width)
    return [torch.randn(shape, generator=g) for _ in range(2 if name in ("between", "after") else 1)]


@torch.no_grad()
@pytest.mark.parametrize("name", ["florence2", "florence2_prenorm"])
def test_every_layer_has_its_own_weights(name, tmp_path, monkeypatch):
    decoder, made = view(zoo.make(name)).decoder, []
    exported = graphs._exported
    monkeypatch.setattr(graphs, "_exported", lambda *given: made.append(given) or exported(*given))
    found = Graphs(folder=tmp_path)
    for k in range(1, decoder.num_layers + 1):
        for piece, module in decoder.pieces(k).named().items():
            graph = found.make(module, *examples(piece, decoder.width, 0))
            tensors = examples(piece, decoder.width, seed=k, n=7)
            for ours, theirs in zip(run(graph, *tensors), outputs(module, *tensors), strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-6)
    assert len(made) == 4  # the pieces of one layer; of the others only the weights are new
    monkeypatch.setattr(graphs, "_exported", lambda *_: pytest.fail("exported again"))
    Graphs(folder=tmp_path).make(decoder.pieces(1).before, *examples("before", decoder.width, 0))


@torch.no_grad()
@pytest.mark.parametrize(("name", "kinds"), {"florence2": 2, "t5": 2, "blip_vqa": 2, "t5gemma2": 3}.items())
def test_encoder_layers_of_a_kind_are_exported_once(name, kinds, tmp_path, monkeypatch):
    """T5's first layer has a table of its own; those of T5Gemma 2 have two windows."""
    backbone, known, made = view(zoo.make(name)), zoo.inputs(name, 2), []
    exported = graphs._exported
    monkeypatch.setattr(graphs, "_exported", lambda *given: made.append(given) or exported(*given))
    found = Graphs(folder=tmp_path)
    for stream in backbone.encoders:
        state = stream.prologue(known, known)
        for k in range(1, stream.num_layers + 1):
            call = stream.call(k, state)
            ours = run(found.make(call.module, *call.tensors, free=call.free), *call.tensors)
            state.h_BTD = call()
            np.testing.assert_allclose(ours[0], state.h_BTD, rtol=1e-4, atol=1e-4)
        known[stream.name] = stream.epilogue(state)
    assert len(made) == kinds


class Twice(nn.Module):
    def __init__(self, factor=2.0):
        super().__init__()
        self.one, self.other, self.factor = nn.Linear(6, 6), nn.Linear(6, 6), factor
        for linear in (self.one, self.other):
            nn.init.zeros_(linear.bias)
            nn.init.eye_(linear.weight)

    def forward(self, x_ND):
        return self.one(x_ND) + self.factor * self.other(x_ND)


@torch.no_grad()
def test_weights_that_are_equal_are_not_one(tmp_path):
    x_ND, template = torch.randn(4, 6), Graphs(folder=tmp_path)
    template.make(Twice(), x_ND)
    module = Twice()
    nn.init.normal_(module.other.weight)
    nn.init.normal_(module.one.bias)
    for each in (module, Twice(factor=3.0)):  # a number in the code is no weight, and makes another template
        np.testing.assert_allclose(run(template.make(each, x_ND), x_ND)[0], each(x_ND), rtol=1e-5, atol=1e-6)


class OfItsPlace(nn.Linear):
    """Computes with what in transformers' layers is a place in a cache."""

    def __init__(self, layer_idx):
        super().__init__(6, 6)
        self.layer_idx = layer_idx

    def forward(self, x_ND):
        return super().forward(x_ND) / (self.layer_idx + 1)


@torch.no_grad()
def test_another_place_is_another_template_where_it_may_matter(tmp_path):
    x_ND = torch.randn(4, 6)
    for module in map(OfItsPlace, range(3)):
        graph = Graphs(folder=tmp_path).make(module, x_ND)
        np.testing.assert_allclose(run(graph, x_ND)[0], module(x_ND), rtol=1e-5, atol=1e-6)


def test_a_weight_without_a_place_is_refused(tmp_path):
    graph, bigger = Graphs(folder=tmp_path).make(Twice(), torch.randn(4, 6)), Twice()
    bigger.third = nn.Linear(6, 6)
    with pytest.raises(ValueError, match=r"Twice has no place for its weights \['third.bias', 'third.weight'\]"):
        with_weights(graph, bigger)


@torch.no_grad()
def test_in_8_bits(tmp_path, monkeypatch):
    decoder = view(zoo.make("florence2")).decoder
    module, tensors = decoder.pieces(2).after, examples("after", decoder.width, 1, n=9)
    graph = Graphs("int8", tmp_path).make(module, *tensors)
    (ours,), (theirs,) = run(graph, *tensors), outputs(module, *tensors)
    error = np.abs(ours - theirs).max()
    assert 1e-4 < error < 0.1 * np.abs(theirs).max()  # quantised, and not by much
    assert len(graph) < len(Graphs(folder=tmp_path).make(module, *tensors))
    monkeypatch.setattr(quantise, "by_tensor", lambda *_: pytest.fail("quantised again"))
    assert Graphs("int8", tmp_path).make(module, *tensors) == graph


@pytest.mark.parametrize("precision", ["int8", "int8_rows"])
@torch.no_grad()
def test_where_products_overflow_weights_are_smaller(tmp_path, monkeypatch, precision):
    onnx = pytest.importorskip("onnx")
    decoder = view(zoo.make("florence2")).decoder
    module, tensors = decoder.pieces(2).after, examples("after", decoder.width, 1, n=9)

    def largest():
        model = onnx.ModelProto.FromString(Graphs(precision, tmp_path).make(module, *tensors))
        integers = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 2]
        assert integers
        return max(np.abs(onnx.numpy_helper.to_array(tensor).astype(int)).max() for tensor in integers)

    quantise.weight_levels.cache_clear()
    assert largest() == quantise.weight_levels()
    monkeypatch.setattr(quantise, "weight_levels", lambda: 63)
    assert 60 <= largest() <= 64  # 64 too: 255 * 64 * 2 lies within 16 bits
    graph = Graphs(precision, tmp_path).make(module, *tensors)
    (ours,), (theirs,) = run(graph, *tensors), outputs(module, *tensors)
    assert np.abs(ours - theirs).max() < 0.15 * np.abs(theirs).max()


def test_a_machine_without_exact_products_has_no_8_bits(monkeypatch):
    monkeypatch.setattr(quantise, "largest_weight", lambda *_: None)
    quantise.weight_levels.cache_clear()
    with pytest.raises(ValueError, match="not exact on this machine; take precision 'float32'"):
        Graphs("int8")
    assert Graphs().levels is None


@pytest.mark.parametrize("name", ["before", "between", "after", "memory"])
@torch.no_grad()
def test_in_8_bits_by_row(tmp_path, name):
    """Against rounding by hand in float64; a row is the same beside others and alone."""
    decoder = view(zoo.make("florence2")).decoder
    module = getattr(decoder.pieces(2), name)
    tensors = [tensor.clone() for tensor in examples(name, decoder.width, 1, n=9)]
    for tensor in tensors:
        tensor[0] *= 50
    graph = Graphs("int8_rows", tmp_path).make(module, *tensors)
    found = run(graph, *tensors)
    expected = outputs(by_hand(module), *(tensor.double() for tensor in tensors))
    for ours, theirs in zip(found, expected, strict=True):
        steps = np.abs(ours - theirs).max() / np.abs(theirs).max()
        assert steps < 0.01  # a number may be rounded the other way where float32 and float64 differ
        assert np.quantile(np.abs(ours - theirs), 0.9) < 1e-5 * np.abs(theirs).max()
    assert np.abs(found[-1] - outputs(module, *tensors)[-1]).max() > 1e-4
    for row in range(len(tensors[0])):
        alone = run(graph, *(tensor[row : row + 1] for tensor in tensors))
        assert all(np.array_equal(together[row], one[0]) for together, one in zip(found, alone, strict=True))


def by_hand(module):
    """Return the module in float64, whose linears round their weights and each row that they read."""
    module = copy.deepcopy(module).double()
    for linear in [part for part in module.modules() if isinstance(part, nn.Linear)]:
        scale_V = linear.weight.abs().amax(1, keepdim=True) / 127
        linear.weight.copy_((linear.weight / scale_V).round() * scale_V)
        linear.register_forward_pre_hook(lambda _, given: (rounded(given[0]),))
    return module


def rounded(x):
    unit = x.abs().amax(-1, keepdim=True) / 127
    return (x / unit).round() * unit


def test_unknown_precisions():
    with pytest.raises(ValueError, match=r"precisions .*'int8_rows'.*, got 'int4'"):
        Graphs("int4")


@torch.no_grad()
def test_convolutions_keep_float32(tmp_path):
    """Of 8 bits are matrices alone."""
    module = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Linear(6, 5)).eval()
    pixels = torch.randn(2, 4, 6, 6)
    graph = Graphs("int8", tmp_path).make(module, pixels, free=[(0,)])
    kinds = {node.op_type for node in pytest.importorskip("onnx").ModelProto.FromString(graph).graph.node}
    assert "Conv" in kinds
    assert not {"ConvInteger", "Gemm", "MatMul"} & kinds
    np.testing.assert_allclose(run(graph, pixels)[0], module(pixels), atol=0.05)
