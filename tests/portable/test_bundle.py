"""Bundles of graphs: read where nothing but onnxruntime, numpy, tokenizers and Pillow is, and refused when damaged."""

import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import lightning_mue as mue
from lightning_mue.backbones import fingerprint
from lightning_mue.cli import main
from lightning_mue.export import graph_bundle
from lightning_mue.export.manifest import bundle_size, write_manifest
from lightning_mue.inference import ExitEngine
from lightning_mue.policy import ExitPolicy, ExitRule
from lightning_mue.portable.engine import PortableEngine
from lightning_mue.portable.files import _read_safetensors
from tests import zoo
from tests.portable.conftest import make_frozen
from tests.runs import ROOT

pytestmark = pytest.mark.slow

ALONE = """
import sys

class Blocked:
    names = {
        "torch", "transformers", "lightning", "onnx", "onnxscript", "numba", "torchvision", "torchmetrics",
        "webdataset", "scipy", "safetensors", "open_clip", "matplotlib", "rich", "jsonargparse", "yaml",
    }

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ImportError(f"{name} is not there")

sys.meta_path.insert(0, Blocked())
"""


def _safetensors(names):
    text = json.dumps(names).encode()
    return len(text).to_bytes(8, "little") + text + bytes(8)


def alone(code, *args):
    """Run where little is installed; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", ALONE + code, *map(str, args)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    pytest.importorskip("onnxscript")
    return make_frozen("florence2", tmp_path_factory.mktemp("bundle") / "graphs")


@pytest.fixture
def bundle(made, tmp_path):
    """A bundle that a test may damage."""
    return shutil.copytree(made.folder, tmp_path / "bundle")


def test_it_answers_alone(made, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    images, prompts = [Image.open(tmp_path / "a.png")] * 2, ["what is this?", "left of it"]
    policy = ExitPolicy.load(made.folder / "policy.json")
    expected = ExitEngine(made.model, policy, processor=made.processor).answer(images, prompts)
    assert all(expected)
    asked = "import lightning_mue.cli as cli; cli.main(sys.argv[1:])"
    given = ["--image", tmp_path / "a.png", "--prompt", prompts[0]]
    assert alone(asked, "generate", made.folder, *given) == f"{expected[0]}\n"
    drawn = ExitEngine(made.model, policy, processor=made.processor).answer(
        images[:1], prompts[:1], do_sample=True, temperature=2.0, top_k=50, seed=3
    )
    how = ["--sample", "--temperature", 2.0, "--top_k", 50, "--seed", 3]
    assert alone(asked, "generate", made.folder, *given, *how) == f"{drawn[0]}\n" != f"{expected[0]}\n"
    code = """
import json, lightning_mue as mue
from PIL import Image
engine = mue.load(sys.argv[1])
images = [Image.open(sys.argv[2])] * 2
print(json.dumps(engine.answer(images, ["what is this?", "left of it"])))
print(engine.generate(4, **engine.processor(images, ["left of it"] * 2)).sequences.tolist())
"""
    answers, tokens = alone(code, made.folder, tmp_path / "a.png").splitlines()
    assert json.loads(answers) == expected
    found = made.processor(images, ["left of it"] * 2)
    assert json.loads(tokens) == ExitEngine(made.model, policy).generate(4, **found).sequences.tolist()


def test_what_it_holds(made):
    names = {path.relative_to(made.folder).as_posix() for path in made.folder.rglob("*") if path.is_file()}
    graphs = {name for name in names if name.startswith("graphs/")}
    assert names - graphs == {
        "README.md",
        "manifest.json",
        "policy.json",
        "graphs.json",
        "weights.safetensors",
        "processor/processor_config.json",
        "processor/tokenizer.json",
        "processor/tokenizer_config.json",
    }
    assert {name.rpartition(".")[2] for name in graphs} == {"onnx"}
    listed = json.loads((made.folder / "manifest.json").read_text())["files"]
    assert {*listed} == names - {"manifest.json"}
    assert all(len(entry["sha256"]) == 64 for entry in listed.values())
    weights, rest = bundle_size(made.folder)
    assert weights + rest == sum((made.folder / name).stat().st_size for name in names)
    assert not any(b"/site-packages" in (made.folder / name).read_bytes() for name in names)  # nor how it was made


def test_the_command_writes_the_same_bytes_and_says_how_many(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "lightning_mue.checkpoint.load_checkpoint", lambda _: (SimpleNamespace(model=made.model), made.processor)
    )
    given = ["--ckpt_path", "a.ckpt", "--policy", str(made.folder / "policy.json"), "--out", str(tmp_path / "graphs")]
    main(["freeze", *given, "--runtime", "onnxruntime"])
    weights, rest = bundle_size(made.folder)
    assert f"{weights / 1e6:.1f} MB of weights and graphs, {rest / 1e6:.1f} MB of all else" in capsys.readouterr().out
    assert (tmp_path / "graphs" / "manifest.json").read_text() == (made.folder / "manifest.json").read_text()


def test_freezing_leaves_the_model_as_it_is(made, tmp_path, monkeypatch):
    monkeypatch.setattr(graph_bundle, "write_graphs", lambda model, *_: model.training and pytest.fail("in training"))
    monkeypatch.setattr(graph_bundle, "_check_answers", lambda *_: None)
    before = fingerprint(made.model)
    made.model.train()
    made.model.lm_head.eval()
    mue.freeze(made.model, ExitPolicy(), tmp_path / "bundle", made.processor, runtime="onnxruntime")
    assert made.model.training
    assert not made.model.lm_head.training
    assert fingerprint(made.model) == before
    made.model.eval()


@pytest.mark.parametrize("name", ["weights.safetensors", "graphs.json", "policy.json", "processor/tokenizer.json"])
def test_damage_is_named(bundle, name):
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"{re.escape(repr(name))} of .* is damaged"):
        mue.load(bundle)


def test_files_of_other_bundles_are_refused(bundle):
    ExitPolicy(fingerprint="0" * 16).save(bundle / "policy.json")
    write_manifest(bundle)
    with pytest.raises(ValueError, match=r"policy.json is of another model \(0000000000000000\) than graphs.json"):
        mue.load(bundle)
    (bundle / "weights.safetensors").unlink()
    write_manifest(bundle)
    with pytest.raises(ValueError, match=r"lacks 'weights.safetensors'"):
        mue.load(bundle)


def test_a_graph_that_lies_elsewhere_is_refused(bundle):
    facts = json.loads((bundle / "graphs.json").read_text())
    facts["graphs"]["decoder/embed"]["file"] = "../../outside.onnx"
    (bundle / "graphs.json").write_text(json.dumps(facts))
    write_manifest(bundle)
    engine = mue.load(bundle)
    with pytest.raises(ValueError, match=r"names '../../outside.onnx', which lies outside"):
        engine.files.graph("decoder/embed")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes, and a list of names that would end at 8"),
        ((1 << 62).to_bytes(8, "little") + b"{}", "would end at 4611686018427387912"),
        (_safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-8, -4]}}), "'a' is F32 at -8 to -4 of 8"),
        (_safetensors({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}), "'a' is F32 at 0 to 16 of 8"),
        (_safetensors({"a": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}}), "'a' is BF16 at 0 to 8 of 8"),
    ],
)
def test_weights_that_cannot_be_are_refused(data, message, tmp_path):
    (tmp_path / "weights.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        _read_safetensors(tmp_path / "weights.safetensors")


def test_another_schema_is_refused(bundle):
    facts = json.loads((bundle / "graphs.json").read_text())
    (bundle / "graphs.json").write_text(json.dumps(facts | {"schema": 99}))
    write_manifest(bundle)
    with pytest.raises(ValueError, match="must be of schema 2, got 99; freeze the model again"):
        mue.load(bundle)


def test_it_runs_where_it_can(made):
    for runtime in (None, "auto", "onnxruntime"):
        assert isinstance(mue.load(made.folder, runtime=runtime), PortableEngine)
    with pytest.raises(ValueError, match="run in 'onnxruntime' on the CPU; got runtime 'torch' and device 'cpu'"):
        mue.load(made.folder, runtime="torch")
    with pytest.raises(ValueError, match="got runtime None and device 'cuda'"):
        mue.load(made.folder, device="cuda")


@pytest.mark.parametrize(
    ("policy", "more", "message"),
    [
        (ExitPolicy(), {"runtime": "tensorrt"}, "for runtime 'onnxruntime', got 'tensorrt'"),
        (ExitPolicy(precision="bfloat16"), {}, "in the model's own or int8.* and the policy asks for 'bfloat16'"),
        (ExitPolicy(), {"processor": None}, "needs a `processor`"),
        (ExitPolicy(precision="int8", groups=("a",)), {}, "holds one precision. Freeze it without `runtime`"),
    ],
)
def test_what_cannot_be_frozen(made, policy, more, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        mue.freeze(made.model, policy, tmp_path / "x", **{"processor": made.processor, "runtime": "onnxruntime"} | more)
    assert not any(tmp_path.iterdir())


def test_other_precisions_of_the_model_are_refused(made, tmp_path):
    model = zoo.make("florence2").to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"models in float32 on the CPU, got torch.bfloat16 on cpu"):
        mue.freeze(model, ExitPolicy(), tmp_path / "x", made.processor, runtime="onnxruntime")


def test_a_processor_that_does_more_is_found_out(made, tmp_path, monkeypatch):
    theirs = type(made.processor).__call__
    monkeypatch.setattr(
        type(made.processor),
        "__call__",
        lambda self, *given: (found := theirs(self, *given)) | {"pixel_values": found["pixel_values"] + 1e-3},
    )
    with pytest.raises(ValueError, match=r"the processor's pixel_values would be others without torch: off by 0.00"):
        mue.freeze(made.model, ExitPolicy(), tmp_path / "x", made.processor, runtime="onnxruntime")
    assert not any(tmp_path.iterdir())


def test_graphs_that_do_something_else_are_found_out(made, tmp_path, monkeypatch):
    def other(model, policy, processor, folder, found):
        for name in ("graphs.json", "weights.safetensors"):
            shutil.copy(made.folder / name, folder / name)
        shutil.copytree(made.folder / "graphs", folder / "graphs")
        with torch.no_grad():
            model.model.language_model.encoder.layers[0].fc1.bias.add_(0.1)

    model = make_model_like(made)
    monkeypatch.setattr(graph_bundle, "write_graphs", other)
    with pytest.raises(ValueError, match="the graphs' memory would be others without torch"):
        mue.freeze(model, ExitPolicy(), tmp_path / "x", made.processor, runtime="onnxruntime")
    assert not any(tmp_path.iterdir())


def test_beams_need_no_graph_of_the_head(made):
    """It is written where a signal needs all logits, and of others beams alone ask for them."""
    tensors, full = zoo.inputs("florence2", 3), ExitEngine(made.model, ExitPolicy.full_depth())
    engine = mue.load(made.folder)
    engine.policy = ExitPolicy.full_depth()
    del engine.files._graphs["decoder/head"]
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    expected = full.generate(6, num_beams=3, **tensors).sequences.tolist()
    assert engine.generate(6, num_beams=3, **arrays).sequences.tolist() == expected


def make_model_like(made):
    import copy

    return copy.deepcopy(made.model)


@pytest.mark.parametrize("rule", [ExitRule.static(1), ExitRule("confidence", (1,), (0.5,))])
def test_a_head_for_all_logits_is_written_where_a_signal_needs_it(made, rule, tmp_path, monkeypatch):
    monkeypatch.setattr(graph_bundle, "_check_answers", lambda *_: None)
    written = []
    monkeypatch.setattr("lightning_mue.export.graph_files._encoder_graphs", lambda *_: ())
    monkeypatch.setattr("lightning_mue.export.graph_files.function_graph", lambda *_: (_ for _ in ()).throw(_Enough))
    monkeypatch.setattr("lightning_mue.export.graph_files._Store.add", lambda _self, name, _graph: written.append(name))
    with pytest.raises(_Enough):
        mue.freeze(made.model, ExitPolicy({"decoder": rule}), tmp_path / "x", made.processor, runtime="onnxruntime")
    assert ("decoder/head" in written) == (rule.signal == "confidence")


class _Enough(Exception):
    """Stops a test where it has seen what it came for."""


def test_the_command_says_what_is_not_there(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["freeze", "--ckpt_path", str(tmp_path), "--out", str(tmp_path / "x"), "--runtime", "torch"])
    assert "invalid choice: 'torch'" in capsys.readouterr().err
