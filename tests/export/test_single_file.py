"""Single-file graphs give what the engine gives wherever all rows leave together, and run no layer above."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_mue.backbones import num_layers, view
from lightning_mue.exits import attached
from lightning_mue.export import freeze, load, single_file
from lightning_mue.export.single_file import export_graphs
from lightning_mue.inference.encode import encode, stream_scores
from lightning_mue.inference.stopwatch import Stopwatch
from lightning_mue.policy import ExitPolicy, ExitRule
from tests import zoo

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.slow

SIGNALS = {
    "florence2": "similarity",
    "florence2_prenorm": "gate",
    "florence2_decomposed": "flat_similarity",
    "florence2_one_way": "static",
    "coca": "gate",
    "trocr": "similarity",
    "vit_gpt2": "gate",
    "donut": "gate",
    "blip": "similarity",
    "blip_vqa": "gate",
    "t5": "similarity",
    "udop": "gate",
    "blip2": "gate",
    "t5gemma2": "similarity",
}
ALWAYS = {"similarity": -1.0, "gate": 0.0, "flat_similarity": -1.0, "static": 0.0}
"""Thresholds that every score reaches."""


def attentions(name, stream):
    """Return how many a layer has."""
    return 2 if (stream, name.split("_")[0]) in (("vision", "florence2"), ("encoder", "blip")) else 1


def streams(name):
    return [stream for stream in zoo.exit_layers(name) if stream != "decoder"]


def inputs(name, batch, seed=0, prompt=6):
    return zoo.BACKBONES[name][1](batch, seed, prompt)


def depths_of(name, stream):
    """Return every depth at which the stream may be left, full depth last."""
    return [*zoo.exit_layers(name)[stream], num_layers(view(zoo.shared(name)))[stream]]


def policy_of(name, **taken):
    """Return the policy that leaves these streams at these exits, ``(index, threshold)``, and no stream elsewhere."""
    rules = {}
    for stream in streams(name):
        layers = zoo.exit_layers(name)[stream]
        thresholds = [torch.inf] * len(layers)
        if stream in taken:
            e, threshold = taken[stream]
            thresholds[e] = threshold
        rules[stream] = ExitRule(SIGNALS[name], layers, thresholds)
    return ExitPolicy(rules)


class Seen:
    """A stream whose outputs are kept."""

    def __init__(self, stream, outputs):
        self._stream, self._outputs = stream, outputs

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def epilogue(self, state):
        self._outputs[self._stream.name] = self._stream.epilogue(state)
        return self._outputs[self._stream.name]


@torch.inference_mode()
def by_engine(name, policy, tensors, on_exit=None):
    """Return stream -> output, and stream -> depths of the rows."""
    model, outputs = zoo.shared(name), {}
    backbone, silent = view(model), Stopwatch(torch.device("cpu"), False)
    seen = [Seen(stream, outputs) for stream in backbone.encoders]
    found = encode(backbone, attached(model), tensors, policy.rules, silent, on_exit, seen)
    return outputs, {stream: depths.tolist() for stream, depths in found.depths.items()}


def session_of(path, **settings):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    for setting, value in settings.items():
        setattr(options, setting, value)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def by_graphs(sessions, known, policy=None):
    """Return stream -> output and depth, each from what is known; with a policy's thresholds, or the files' own."""
    found = {}
    for stream, session in sessions.items():
        given = {value.name: known[value.name].numpy() for value in session.get_inputs()}
        if policy is not None:
            given["thresholds"] = np.array(policy.rules[stream].thresholds, dtype=np.float32)
        found[stream] = session.run([stream, "depth"], given)
    return found


def scores_of(name, stream, k, tensors):
    """Return the scores of the rows after this layer, all at full depth."""
    exits, found = attached(zoo.shared(name)), []

    def record(passed, layer, state, before_BTD):
        if (passed, layer) == (stream, k):
            found.append(stream_scores(exits, SIGNALS[name], stream, k, state, before_BTD))

    by_engine(name, ExitPolicy.full_depth(), tensors, record)
    return found[0].tolist()


@pytest.fixture(scope="module", params=list(zoo.BACKBONES))
def exported(request, tmp_path_factory):
    """A backbone's name, and its files; with their own thresholds nothing is left early."""
    name = request.param
    return name, export_graphs(zoo.shared(name), policy_of(name), tmp_path_factory.mktemp("g"), inputs(name, 1))


@pytest.fixture(scope="module")
def graphs(exported):
    name, paths = exported
    return name, {path.stem: session_of(path) for path in paths}


def assert_same(found, outputs, depths):
    """Every stream gave what the engine gave, at the depth at which it left."""
    for stream, (output, depth) in found.items():
        assert depth.dtype == np.int64
        assert {int(depth)} == {*depths[stream]}
        np.testing.assert_allclose(output, outputs[stream], rtol=1e-5, atol=5e-5)


def test_a_row_leaves_where_the_engine_does(graphs):
    name, sessions = graphs
    assert list(sessions) == streams(name)
    for stream in streams(name):
        for e, depth in enumerate(depths_of(name, stream)):
            last = e == len(zoo.exit_layers(name)[stream])
            policy = policy_of(name) if last else policy_of(name, **{stream: (e, ALWAYS[SIGNALS[name]])})
            tensors = inputs(name, 1, seed=e, prompt=5 + e)
            outputs, depths = by_engine(name, policy, tensors)
            assert depths[stream] == [depth]
            assert_same(by_graphs(sessions, tensors | outputs, policy), outputs, depths)


def test_a_batch_leaves_where_all_of_its_rows_may(graphs):
    name, sessions = graphs
    tensors = inputs(name, 3, seed=1, prompt=9)
    full = by_engine(name, ExitPolicy.full_depth(), tensors)
    for stream in streams(name):
        scores = sorted(scores_of(name, stream, depths_of(name, stream)[0], tensors))
        policy = policy_of(name, **{stream: (0, scores[0] - 1e-5)})
        outputs, depths = by_engine(name, policy, tensors)
        assert depths != full[1]
        assert_same(by_graphs(sessions, tensors | outputs, policy), outputs, depths)
        if SIGNALS[name] != "static":
            policy = policy_of(name, **{stream: (0, scores[1] + 1e-5)})  # not all of them
            assert (by_engine(name, policy, tensors)[1] == full[1]) == (SIGNALS[name] == "flat_similarity")
            assert_same(by_graphs(sessions, tensors | full[0], policy), *full)
    assert_same(by_graphs(sessions, tensors | full[0]), *full)  # the files' own thresholds


def branches(graph):
    """Return the nodes that run always; for each If those below it: if its exit is taken, and if not; and all."""
    always, below = [node.name for node in graph.node if node.op_type != "Constant"], []  # constants never run
    for node in graph.node:
        if node.op_type == "If":
            of = {attribute.name: branches(attribute.g) for attribute in node.attribute}
            below = [(of["then_branch"][0], of["else_branch"][2]), *of["else_branch"][1]]
    return always, below, always + [name for parts in below[:1] for part in parts for name in part]


def executed(path, known, policy, folder):
    """Return name -> operator of the nodes that ran."""
    plain = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # others rename what they fuse
    how = {"enable_profiling": True, "profile_file_prefix": str(folder / "profile"), "graph_optimization_level": plain}
    session = session_of(path, **how)
    by_graphs({path.stem: session}, known, policy)
    events = json.loads(Path(session.end_profiling()).read_text())
    nodes = [event for event in events if event["cat"] == "Node"]
    return {event["name"].removesuffix("_kernel_time"): event["args"]["op_name"] for event in nodes}


def test_layers_above_the_exit_are_not_run(exported, tmp_path):
    name, paths = exported
    tensors = inputs(name, 2)
    known = tensors | by_engine(name, ExitPolicy.full_depth(), tensors)[0]
    for path in paths:
        always, below, _ = branches(onnx.load(path).graph)
        at_full_depth = executed(path, known, policy_of(name), tmp_path)
        assert at_full_depth.keys() >= {*always}
        *exits, full = depths_of(name, path.stem)
        assert len(below) == len(exits)
        for e, (then, above) in enumerate(below):
            ran = executed(path, known, policy_of(name, **{path.stem: (e, ALWAYS[SIGNALS[name]])}), tmp_path)
            assert ran.keys() >= {*always, *then}
            assert ran.keys().isdisjoint(above)
            assert at_full_depth.keys().isdisjoint(then)
            spared = [*at_full_depth.values()].count("Softmax") - [*ran.values()].count("Softmax")
            assert spared == attentions(name, path.stem) * (full - exits[e])


def test_files_are_sound_and_hold_each_weight_once(exported):
    _, paths = exported
    for path in paths:
        onnx.checker.check_model(path, full_check=True)
        graph = onnx.load(path).graph
        weights = [tensor.raw_data for tensor in graph.initializer if len(tensor.raw_data) > 64]
        assert len(weights) == len(set(weights))
        assert all(not node.metadata_props for node in graph.node)
        _, _, names = branches(graph)
        assert len(names) == len(set(names))


def test_weights_may_lie_beside_a_graph(exported, tmp_path, monkeypatch):
    name, paths = exported
    monkeypatch.setattr(single_file, "LARGEST", 1000)
    stream, tensors = paths[0].stem, inputs(name, 1)
    path = single_file._saved(onnx.load(paths[0]), tmp_path / f"{stream}.onnx")
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"{stream}.onnx", f"{stream}.onnx.data"]
    assert path.stat().st_size < paths[0].stat().st_size / 2
    assert_same(by_graphs({stream: session_of(path)}, tensors), *by_engine(name, ExitPolicy.full_depth(), tensors))


def test_thresholds_that_hold_for_good(tmp_path):
    name, tensors = "florence2_prenorm", inputs("florence2_prenorm", 2)
    vision, encoder = ExitRule("gate", (1, 3), (torch.inf, 0.0)), ExitRule.static(1)
    policy = ExitPolicy({"vision": vision, "encoder": encoder})
    paths = export_graphs(zoo.shared(name), policy, tmp_path, tensors, fold=True)
    outputs, depths = by_engine(name, policy, tensors)
    assert depths == {"vision": [3, 3], "encoder": [1, 1]}
    assert_same(by_graphs({path.stem: session_of(path) for path in paths}, tensors | outputs), outputs, depths)
    vision, encoder = (onnx.load(path).graph for path in paths)
    assert "thresholds" not in [
        value.name for graph in (vision, encoder) for value in (*graph.input, *graph.initializer)
    ]
    assert [len(branches(graph)[1]) for graph in (vision, encoder)] == [1, 0]
    assert not any("layers.1." in tensor.name for tensor in encoder.initializer)


def test_what_graphs_do_not_do_is_refused(tmp_path):
    model, tensors = zoo.shared("florence2"), inputs("florence2", 1)
    with pytest.raises(ValueError, match="for the groups \\['easy'\\] alone; graphs know no groups"):
        export_graphs(model, ExitPolicy(groups=("easy",)), tmp_path, tensors)
    with pytest.raises(ValueError, match="Graphs compute in float32, got a policy in int8"):
        export_graphs(model, ExitPolicy(precision="int8"), tmp_path, tensors)
    with pytest.raises(ValueError, match=r"for a model in torch\.bfloat16"):
        export_graphs(zoo.make("florence2").bfloat16(), ExitPolicy(), tmp_path, tensors)
    with pytest.raises(ValueError, match="names the stream 'image'"):
        export_graphs(model, ExitPolicy({"image": ExitRule.static(1)}), tmp_path, tensors)
    assert not any(tmp_path.iterdir())


def test_a_bundle_with_its_graphs(talking_model, make_processor, tmp_path):
    with pytest.raises(ValueError, match="`graphs` needs a processor"):
        freeze(talking_model, ExitPolicy(), tmp_path / "b", graphs=True)
    bundle, processor = (
        freeze(talking_model, ExitPolicy(), tmp_path / "b", make_processor(), graphs=True),
        make_processor(),
    )
    assert load(bundle).policy.is_full_depth
    pictures = [Image.fromarray(np.full((20, 30, 3), shade, np.uint8)) for shade in (10, 200)]
    known = dict(processor(pictures, ["what is this?", "a red square left of it"]))
    for stream in ("vision", "encoder"):
        session = session_of(bundle / "single_file" / f"{stream}.onnx")
        ((output, depth),) = by_graphs({stream: session}, known).values()
        known[stream] = torch.from_numpy(output)
        assert depth == 4
    with torch.no_grad():
        tensors = {key: known[key] for key in ("pixel_values", "input_ids", "attention_mask")}
        states = talking_model.model(**tensors, decoder_input_ids=torch.tensor([[2], [2]])).encoder_last_hidden_state
    seen = known["attention_mask"].bool()
    np.testing.assert_allclose(known["encoder"][seen], states[seen], rtol=1e-4, atol=1e-4)
