"""What is no bundle, damaged or of another bundle is refused, and the message names the file."""

import json
import shutil
import sys
from dataclasses import replace

import pytest

from lightning_mue.export import freeze, load, manifest
from lightning_mue.policy import ExitPolicy, ExitRule
from tests import zoo
from tests.export.conftest import mixed_policy

FILES = ["README.md", "config.json", "manifest.json", "model.safetensors", "policy.json"]


@pytest.fixture(scope="session")
def other_once(tmp_path_factory):
    """A bundle of the same shape with other weights."""
    return freeze(zoo.make("florence2", seed=1), mixed_policy("florence2"), tmp_path_factory.mktemp("other") / "b")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", [0.0, 0.5, 1.0])
def test_one_flipped_byte_is_refused_by_name(bundle, name, where):
    data = bytearray((bundle / name).read_bytes())
    data[int(where * (len(data) - 1))] ^= 1
    (bundle / name).write_bytes(data)
    with pytest.raises(ValueError, match=name):
        load(bundle)


@pytest.mark.parametrize("name", [name for name in FILES if name != "manifest.json"])
def test_a_truncated_file_is_refused_by_name(bundle, name):
    data = (bundle / name).read_bytes()
    (bundle / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=f"'{name}' of .* is truncated"):
        load(bundle)


@pytest.mark.parametrize("name", [name for name in FILES if name != "manifest.json"])
def test_a_missing_file_is_refused_by_name(bundle, name):
    (bundle / name).unlink()
    with pytest.raises(ValueError, match=f"lacks '{name}'"):
        load(bundle)


@pytest.mark.parametrize("name", ["model.safetensors", "policy.json", "config.json"])
def test_a_file_left_out_of_the_manifest_too_is_refused(bundle, name):
    (bundle / name).unlink()
    manifest.write_manifest(bundle)
    with pytest.raises(ValueError, match=f"lacks '{name}'"):
        load(bundle)


def test_no_folder_and_no_bundle(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="not a bundle: it has no manifest"):
        load(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "something else"}')
    with pytest.raises(ValueError, match="not of a lightning_mue bundle"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["weights.bin", "a.pt", "sub/a.PKL", "last.ckpt"])
@pytest.mark.parametrize("listed", [False, True])
def test_pickles_are_refused(bundle, name, listed):
    (bundle / name).parent.mkdir(exist_ok=True)
    (bundle / name).write_bytes(b"")
    if listed:
        manifest.write_manifest(bundle)
    with pytest.raises(ValueError, match=f"'{name}', which may be a pickle"):
        load(bundle)


def test_unlisted_files_are_refused_hidden_ones_let_be(bundle):
    (bundle / ".git").mkdir()
    (bundle / ".git" / "config").write_text("")
    load(bundle)
    (bundle / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"'notes.txt', which its manifest.json does not list"):
        load(bundle)


def test_another_schema_is_refused(bundle):
    config = json.loads((bundle / "config.json").read_text())
    (bundle / "config.json").write_text(json.dumps(config | {"schema": 99}))
    manifest.write_manifest(bundle)
    with pytest.raises(ValueError, match="config of schema 2"):
        load(bundle)
    data = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps(data | {"schema": 99}))
    with pytest.raises(ValueError, match="bundle of schema 99"):
        load(bundle)


def test_a_manifest_that_names_files_outside_is_refused(bundle):
    (bundle / "manifest.json").unlink()
    (bundle.parent / "secret").write_text("")
    entry = {"../secret": {"bytes": 0, "sha256": "0" * 64}}
    (bundle / "manifest.json").write_text(manifest._as_text(entry))
    with pytest.raises(ValueError, match="outside the bundle"):
        load(bundle)


@pytest.mark.parametrize("name", ["model.safetensors", "policy.json", "config.json"])
def test_files_of_another_bundle_are_refused(bundle, other_once, name):
    shutil.copy(other_once / name, bundle / name)
    manifest.write_manifest(bundle)
    with pytest.raises(ValueError, match=r"mixes files of different bundles.*another model"):
        load(bundle)


def test_weights_of_another_shape_are_refused(bundle, tmp_path):
    plain = freeze(zoo.make("florence2", exits=False), ExitPolicy.full_depth(), tmp_path / "plain")
    shutil.copy(bundle / "model.safetensors", plain / "model.safetensors")
    manifest.write_manifest(plain)
    with pytest.raises(ValueError, match=r"model.safetensors is of another model: .*mue_exits"):
        load(plain)
    (plain / "model.safetensors").write_bytes(b"\xff" * 100)
    manifest.write_manifest(plain)
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read"):
        load(plain)


def test_freezing_refuses_a_policy_of_other_weights(tmp_path):
    policy = replace(mixed_policy("florence2"), fingerprint="0123456789abcdef")
    with pytest.raises(ValueError, match=r"0123456789abcdef, this model has .* calibrate again"):
        freeze(zoo.make("florence2"), policy, tmp_path / "b")
    with pytest.raises(ValueError, match="exits lie in"):
        freeze(zoo.make("florence2"), ExitPolicy({"vision": ExitRule.static(9)}), tmp_path)
    assert not any(tmp_path.iterdir())


def test_freezing_refuses_a_processor_it_cannot_save(tmp_path):
    with pytest.raises(TypeError, match="got object"):
        freeze(zoo.make("florence2"), ExitPolicy.full_depth(), tmp_path / "b", processor=object())
    assert not any(tmp_path.iterdir())


def test_freezing_refuses_a_model_that_its_config_does_not_describe(tmp_path):
    model = zoo.make("florence2")
    model.lm_head.weight = type(model.lm_head.weight)(model.lm_head.weight.detach() + 1)  # no longer tied
    with pytest.raises(ValueError, match="not the one its own config describes"):
        freeze(model, ExitPolicy.full_depth(), tmp_path / "b")
    assert not any(tmp_path.iterdir())


def test_only_a_bundle_is_replaced(bundle, tmp_path):
    model, full = zoo.make("florence2", seed=2), ExitPolicy.full_depth()
    mine = tmp_path / "mine"
    mine.mkdir()
    freeze(model, full, mine)  # an empty folder has nothing to lose
    shutil.rmtree(mine)
    mine.mkdir()
    (mine / "thesis.txt").write_text("years")
    with pytest.raises(ValueError, match="not a bundle; it is left as it is"):
        freeze(model, full, mine)
    with pytest.raises(ValueError, match="not a bundle"):
        freeze(model, full, mine / "thesis.txt")
    (bundle / ".git").write_text("")
    with pytest.raises(ValueError, match=r"also holds '.git'"):
        freeze(model, full, bundle)
    (bundle / ".git").unlink()
    freeze(model, full, bundle)
    assert load(bundle).policy.is_full_depth
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "mine"]


def test_a_failed_freeze_leaves_the_old_bundle(bundle, monkeypatch):
    before = {path.name: path.read_bytes() for path in bundle.iterdir()}

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(sys.modules["lightning_mue.export.freezing"], "write_manifest", fail)
    with pytest.raises(OSError, match="disk full"):
        freeze(zoo.make("florence2", seed=2), ExitPolicy.full_depth(), bundle)
    assert {path.name: path.read_bytes() for path in bundle.iterdir()} == before
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]
