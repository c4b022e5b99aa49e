"""Bad input through the doors that users take: the message says what was asked, what was found and what to do.

What single modules refuse is tested beside them (tests/data, tests/export, tests/calibration, tests/test_policy.py).
"""

import io
import json
import pickle
import shutil
import tarfile

import pytest
import torch
import yaml
from PIL import Image

from lightning_mue import CalibrateExits, ExitEngine, ExitPolicy, ExitRule, MultiExitModule
from lightning_mue.callbacks import decoding
from lightning_mue.export import manifest
from tests import zoo
from tests.runs import members_of, mue, policy_file


def write_shard(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def corrupt_picture(members):
    name = min(name for name in members if name.endswith(".png"))
    return members | {name: members[name][:60]}


def empty_text(members):
    name = min(name for name in members if name.endswith(".json"))
    record = json.loads(members[name])
    record["qa"][0]["refs"] = [" "]
    return members | {name: json.dumps(record).encode()}


def empty_caption(members):
    name = min(name for name in members if name.endswith(".json"))
    return members | {name: json.dumps(json.loads(members[name]) | {"refs": [""]}).encode()}


def pickled(members):
    return members | {"zz.pkl": pickle.dumps(print)}


@pytest.mark.parametrize(
    ("damage", "task", "message"),
    [
        (corrupt_picture, "vqa", r"sample 'scene-0-\d+' of .*val-000.tar has a corrupt picture"),
        (empty_text, "vqa", r"sample 'scene-0-\d+' of .*val-000.tar: .*the text of q0 is empty"),
        (empty_caption, "caption", r"sample 'scene-0-\d+' of .*val-000.tar: .*empty"),
        (pickled, "vqa", r"val-000.tar holds the member 'zz.pkl': only .* are read .*write the shard without it"),
        (None, "vqa", r"shard .*val-000.tar is truncated or no tar, after .*copy it again"),
    ],
)
def test_broken_shards(fitted, shards, tmp_path, damage, task, message):
    folder = shutil.copytree(shards, tmp_path / "shards")
    shard = folder / "val-000.tar"
    if damage is None:
        shard.write_bytes(shard.read_bytes()[:20_000])
    else:
        write_shard(shard, damage(members_of(shard)))
    data = ["--data.val", folder, "--data.task", task]
    with pytest.raises(ValueError, match=message):
        mue("calibrate", "-c", fitted / "recipe.yaml", *data)
    assert not (fitted / "policy.json").exists()
    if damage in (corrupt_picture, empty_text):
        with pytest.warns(UserWarning, match="1 broken shards or samples were skipped: sample 'scene-0"):
            mue("validate", "-c", fitted / "recipe.yaml", "--trainer.callbacks", "null", *data, "--data.on_bad", "skip")


def test_no_validation_data(fitted, shards, tmp_path):
    recipe = fitted / "recipe.yaml"
    with pytest.raises(FileNotFoundError, match=r"no val data: .*nowhere.* matches no shard; give a folder"):
        mue("calibrate", "-c", recipe, "--data.val", tmp_path / "nowhere")
    (tmp_path / "train").mkdir()
    shutil.copy(shards / "train-000.tar", tmp_path / "train")
    with pytest.raises(FileNotFoundError, match=r"no val data: .*train matches no shard"):
        mue("fit", "-c", recipe, "--data.val", tmp_path / "train")
    with pytest.raises(ValueError, match=r"no calibration data: `select` 0.999 leaves none of 90 pictures; change it"):
        mue("calibrate", "-c", recipe, "--data.select", 0.999)
    with pytest.raises(ValueError, match=r"no calibration data: `holdout` 0.001 leaves none of 60 pictures"):
        mue("calibrate", "-c", recipe, "--data.holdout", 0.001)
    with pytest.raises(ValueError, match=r"Nothing was calibrated: no validation data. .*limit_val_batches"):
        mue("calibrate", "-c", recipe, "--trainer.limit_val_batches", 0)
    with pytest.raises(ValueError, match=r"needs samples to propose on and others to certify.*found .* Give more"):
        mue("calibrate", "-c", recipe, "--data.calibration_limit", 2)
    assert not (fitted / "policy.json").exists()


def test_too_little_data_is_said_before_anything_is_decoded(fitted, monkeypatch, capsys):
    monkeypatch.setattr(decoding.SplitDecoder, "_decode", lambda *_: pytest.fail("decoded"))
    recipe = (fitted / "recipe.yaml").read_text()
    (fitted / "recipe.yaml").write_text(recipe.replace("keep: ", "estimate: false\n      keep: "))
    mue("calibrate", "-c", fitted / "recipe.yaml", "--keep", 0.98)
    policy = ExitPolicy.load(fitted / "policy.json")
    assert policy.is_full_depth
    mue("policy", "show", fitted / "policy.json")
    text = capsys.readouterr().out
    assert "full-depth model" in text
    assert "keep=0.98 of consistency at 95% confidence needs at least" in text
    assert f"there are {policy.certificate.evidence[0].clusters}. Gather more, or ask for less: keep=" in text
    assert not list((fitted / "calibration").glob("decoded-*"))


def test_an_impossible_keep(fitted):
    message = r"`keep` must lie in \(0, 1\) .*such as 0.98\), got 1.2"
    with pytest.raises(ValueError, match=message):
        mue("calibrate", "-c", fitted / "recipe.yaml", "--keep", 1.2)
    with pytest.raises(ValueError, match=message):
        CalibrateExits(keep=1.2)
    with pytest.raises(ValueError, match=r"`metric` must be one of .*'spice'"):
        mue("calibrate", "-c", fitted / "recipe.yaml", "--metric", "spice")
    assert not (fitted / "calibration").exists()


def test_no_checkpoint(fitted):
    (fitted / "last.ckpt").unlink()
    for command in ("validate", "calibrate", "test", "predict"):
        with pytest.raises(FileNotFoundError, match=r"`ckpt_path` is 'last' and .* holds no last.ckpt: run `mue fit`"):
            mue(command, "-c", fitted / "recipe.yaml")


def test_an_unknown_stream(fitted):
    message = r"ExitConfig has no \['audio'\]; it has .*'decoder'.*'vision'"
    recipe = yaml.safe_load((fitted / "recipe.yaml").read_text())
    recipe["model"]["exits"]["audio"] = [1]
    (fitted / "audio.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(ValueError, match=message):
        mue("fit", "-c", fitted / "audio.yaml")
    with pytest.raises(ValueError, match=message):
        MultiExitModule(zoo.tiny_florence2(), {"audio": [1]})
    policy = policy_file(fitted / "p.json", rules={"audio": {"signal": "static", "layers": [1], "thresholds": [0.0]}})
    message = r"The policy names the stream 'audio'; this backbone has \['vision', 'encoder', 'decoder'\]"
    with pytest.raises(ValueError, match=message):
        ExitEngine(zoo.make("florence2"), ExitPolicy.load(policy))
    with pytest.raises(ValueError, match=message):
        mue("test", "-c", fitted / "recipe.yaml", "--policy", policy)
    with pytest.raises(SystemExit, match=message):
        mue("freeze", "--ckpt_path", fitted / "last.ckpt", "--policy", policy, "--out", fitted / "bundle")
    assert not (fitted / "bundle").exists()


def test_a_layer_that_is_no_exit(fitted):
    with pytest.raises(
        ValueError, match=r"Exits of 'decoder' must rise within 1..4 \(layer 5 is full depth\), got \[5\]"
    ):
        MultiExitModule(zoo.tiny_florence2(), {"decoder": [5]})
    with pytest.raises(ValueError, match=r"leaves 'decoder' after layer 9; exits lie in 1..4"):
        ExitEngine(zoo.make("florence2"), ExitPolicy({"decoder": ExitRule.static(9)}))


def test_a_threshold_out_of_range(fitted):
    rule = {"signal": "gate", "layers": [1], "thresholds": [1.3]}
    policy = policy_file(fitted / "p.json", rules={"decoder": rule})
    message = r"`thresholds\['decoder'\]` must lie in \[0, 1\] for signal 'gate' .*got 1.3"
    with pytest.raises(SystemExit, match=f"mue policy: {message}"):
        mue("policy", "show", policy)
    with pytest.raises(SystemExit, match=f"mue freeze: {message}"):
        mue("freeze", "--ckpt_path", fitted / "last.ckpt", "--policy", policy, "--out", fitted / "bundle")
    with pytest.raises(ValueError, match=message):
        mue("test", "-c", fitted / "recipe.yaml", "--policy", policy)


def test_no_such_policy(fitted):
    with pytest.raises(SystemExit, match=r"mue policy: .*none.json"):
        mue("policy", "show", fitted / "none.json")
    with pytest.raises(FileNotFoundError, match=r"none.json"):
        mue("test", "-c", fitted / "recipe.yaml", "--policy", fitted / "none.json")


@pytest.mark.parametrize("how", ["truncated", "foreign", "pickle", "no checkpoint"])
def test_what_is_no_checkpoint_cannot_be_frozen(fitted, how):
    path = fitted / "last.ckpt"
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    elif how == "foreign":
        path.write_text("hello")
    else:
        torch.save({"a": print} if how == "pickle" else {"weights": torch.ones(1)}, path)
    with pytest.raises(
        SystemExit, match=r"mue freeze: .*last.ckpt must be a Lightning checkpoint of a MultiExitModule"
    ):
        mue("freeze", "--ckpt_path", path, "--out", fitted / "bundle")
    assert not (fitted / "bundle").exists()


def generate(bundle, image):
    mue("generate", bundle, "--image", image, "--prompt", "what shape is it ?")


def test_bundles_that_are_damaged_or_mixed(calibrated, tmp_path):
    picture = tmp_path / "a.png"
    Image.new("RGB", (24, 24)).save(picture)
    bundle, weights = calibrated / "bundle", calibrated / "bundle" / "model.safetensors"
    with pytest.raises(SystemExit, match=r"mue generate: .*nowhere is not a bundle: there is no such folder"):
        generate(tmp_path / "nowhere", picture)
    whole = weights.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    weights.write_bytes(flipped)
    with pytest.raises(SystemExit, match=r"mue generate: 'model.safetensors' of .* damaged .*copy the bundle again"):
        generate(bundle, picture)
    mue("freeze", "--ckpt_path", calibrated / "best.ckpt", "--policy", full_depth(tmp_path), "--out", tmp_path / "best")
    shutil.copy(tmp_path / "best" / "model.safetensors", weights)
    with pytest.raises(SystemExit, match=r"'model.safetensors' of .* (changed|damaged)"):
        generate(bundle, picture)
    manifest.write_manifest(bundle)  # even if somebody made the sums right
    with pytest.raises(SystemExit, match=r"mixes files of different bundles: .*another model.*Copy the bundle again"):
        generate(bundle, picture)


def full_depth(folder):
    return policy_file(folder / "full.json")


def test_a_policy_of_other_weights_is_not_frozen(calibrated):
    with pytest.raises(SystemExit, match=r"mue freeze: The policy was calibrated for weights .*; calibrate again"):
        mue("freeze", "--ckpt_path", calibrated / "best.ckpt", "--out", calibrated / "other")


@pytest.mark.parametrize("how", ["no picture", "truncated", "missing"])
def test_pictures_that_cannot_be_read(calibrated, tmp_path, how):
    path = tmp_path / "a.png"
    if how == "no picture":
        path.write_text("hello")
    elif how == "truncated":
        Image.effect_noise((64, 64), 50).save(path)
        path.write_bytes(path.read_bytes()[:1500])
    message = r".*No such file.*a.png" if how == "missing" else r".*a.png must be a picture, and it cannot be read"
    with pytest.raises(SystemExit, match=f"mue generate: {message}"):
        generate(calibrated / "bundle", path)
