"""The life cycle by the commands that a user types: each leaves a file that the next one reads."""

import json

import pytest
import torch
import yaml

from lightning_mue.backbones import fingerprint
from lightning_mue.callbacks import obey_policy
from lightning_mue.checkpoint import load_checkpoint
from lightning_mue.cli import LIGHTNING, OWN
from lightning_mue.data.shards import BadSamples, read_shards
from lightning_mue.policy import ExitPolicy, ExitRule
from lightning_mue.promise import Promise
from tests.runs import members_of, mue, policy_file, tiny_recipe


def test_help_names_every_command(capsys):
    for args in (["--help"], []):
        with pytest.raises(SystemExit) as stopped:
            mue(*args)
        assert not stopped.value.code
        text = capsys.readouterr().out
        for name, what in (LIGHTNING | OWN).items():
            assert f"  {name} " in text
            assert what in text


def test_an_unknown_command_fails_and_is_named():
    with pytest.raises(SystemExit, match="no command 'nonsense'") as stopped:
        mue("nonsense")
    assert stopped.value.code


@pytest.mark.parametrize("command", sorted(OWN))
def test_own_commands_have_help_and_refuse_what_they_do_not_know(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        mue(command, "--help")
    assert stopped.value.code == 0
    assert OWN[command] in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit) as stopped:
        mue(command, "--nonsense")
    assert stopped.value.code == 2


def test_calibrate_has_the_options_of_a_promise(capsys):
    with pytest.raises(SystemExit):
        mue("calibrate", "--help")
    text = capsys.readouterr().out
    for option in ("--keep", "--metric", "--confidence_level", "--ckpt_path"):
        assert option in text


def test_data_writes_shards(tmp_path, capsys):
    mue("data", "scenes", "--out", tmp_path, "--train", 3, "--val", 2, "--size", 24)
    assert "train: 3 pictures" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["index.json", "train-000.tar", "val-000.tar"]
    assert len(list(read_shards([tmp_path / "train-000.tar"], BadSamples()))) == 3


def test_fit_leaves_checkpoints_of_plain_values(fitted_once):
    for name in ("best.ckpt", "last.ckpt"):
        checkpoint = torch.load(fitted_once / name, weights_only=True)
        assert any("mue_exits" in key for key in checkpoint["state_dict"])
        assert checkpoint["hyper_parameters"]["exits"]["decoder"] == [1, 2]
    assert torch.load(fitted_once / "last.ckpt", weights_only=True)["global_step"] == 20
    assert not (fitted_once / "policy.json").exists()


def test_validate_calibrates_where_the_recipe_says_so(calibrated, capsys):
    (calibrated / "policy.json").unlink()
    mue("validate", "-c", calibrated / "recipe.yaml")
    policy = ExitPolicy.load(calibrated / "policy.json")
    assert policy.certificate.promise.keep == 0.6
    assert "val/decoder_1/exact" in capsys.readouterr().out


def test_flags_override_the_recipe(calibrated):
    flags = ["calibrate", "-c", calibrated / "recipe.yaml", "--reuse", "spend"]  # the recipe's own promise is tested
    mue(*flags, "--keep", 0.5, "--confidence_level", 0.9)
    certificate = ExitPolicy.load(calibrated / "policy.json").certificate
    assert certificate.promise == Promise("consistency", keep=0.5)
    assert certificate.confidence_level == pytest.approx(1 - 0.05 - 0.1)
    mue(*flags, "--metric", "accuracy")
    certificate = ExitPolicy.load(calibrated / "policy.json").certificate
    assert certificate.promise == Promise("accuracy", keep=0.6)


def test_calibrate_needs_no_entry_in_the_recipe_and_writes_beside_the_checkpoint(calibrated, shards):
    recipe = tiny_recipe(calibrated / "plain.yaml", shards, calibrated, callbacks=[])
    elsewhere = calibrated / "elsewhere"
    elsewhere.mkdir()
    (calibrated / "policy.json").unlink()
    (calibrated / "last.ckpt").rename(elsewhere / "mine.ckpt")
    flags = ["--metric", "consistency", "--reuse", "spend"]  # the recipe's own promise was tested before
    mue("calibrate", "-c", recipe, "--ckpt_path", elsewhere / "mine.ckpt", *flags, "--keep", 0.5)
    promise = ExitPolicy.load(elsewhere / "policy.json").certificate.promise
    assert promise == Promise("consistency", keep=0.5)
    assert not (calibrated / "policy.json").exists()


def test_the_policy_belongs_to_the_checkpoints_weights(calibrated_once):
    policy = ExitPolicy.load(calibrated_once / "policy.json")
    module, processor = load_checkpoint(calibrated_once / "last.ckpt")
    assert policy.fingerprint == fingerprint(module.model)
    assert processor is not None
    assert policy.certificate.kind == "certified"
    assert policy.certificate.data_fingerprint


@pytest.fixture
def said(monkeypatch):
    """What the command says through Lightning's log."""
    lines = []
    monkeypatch.setattr(obey_policy, "rank_zero_info", lines.append)
    return lines


def test_test_obeys_the_policy(calibrated, capsys, said):
    static = {"signal": "static", "layers": [1], "thresholds": [0.0]}
    other = policy_file(calibrated / "other.json", rules={"decoder": static})
    mue("test", "-c", calibrated / "recipe.yaml", "--policy", other)
    assert said.pop() == "Policy: decoder: static 1"
    assert _printed(capsys.readouterr().out, "test/depth_decoder") == 1.0
    mue("test", "-c", calibrated / "recipe.yaml")  # finds the one beside last.ckpt
    assert said.pop() == f"Policy: {ExitPolicy.load(calibrated / 'policy.json').depths_in_words()}"
    capsys.readouterr()
    (calibrated / "policy.json").unlink()
    mue("test", "-c", calibrated / "recipe.yaml")
    assert said.pop() == "Policy: full depth"
    assert _printed(capsys.readouterr().out, "test/depth_decoder") == 3.0


def test_a_policy_of_other_weights_is_refused_if_named_and_let_be_if_found(calibrated, capsys):
    text = (calibrated / "policy.json").read_text()
    fingerprint = ExitPolicy.load(calibrated / "policy.json").fingerprint
    (calibrated / "policy.json").write_text(text.replace(fingerprint, "0" * len(fingerprint)))
    with pytest.raises(ValueError, match=r"calibrated for weights with fingerprint 0+, this model has .* calibrate"):
        mue("test", "-c", calibrated / "recipe.yaml", "--policy", calibrated / "policy.json")
    with pytest.warns(UserWarning, match=r"policy beside .*last\.ckpt is not obeyed.*full depth"):
        mue("test", "-c", calibrated / "recipe.yaml")
    assert _printed(capsys.readouterr().out, "test/depth_decoder") == 3.0


def test_predict_writes_one_answer_a_sample(calibrated, shards):
    mue("predict", "-c", calibrated / "recipe.yaml")
    rows = [json.loads(line) for line in (calibrated / "predictions.jsonl").read_text().splitlines()]
    records = [json.loads(d) for n, d in members_of(shards / "test-000.tar").items() if n.endswith(".json")]
    assert len(rows) == sum(min(2, len(record["qa"])) for record in records)  # questions_per_picture is 2
    assert [row["sample_id"] for row in rows] == sorted(row["sample_id"] for row in rows)
    assert set(rows[0]) == {"sample_id", "prompt", "answer"}


def test_freeze_and_generate(calibrated, shards, capsys):
    mue("policy", "show", calibrated / "bundle" / "policy.json")
    assert "With 95% confidence" in capsys.readouterr().out
    name, data = next((n, d) for n, d in members_of(shards / "test-000.tar").items() if n.endswith(".png"))
    (calibrated / name).write_bytes(data)
    mue("generate", calibrated / "bundle", "--image", calibrated / name, "--image", calibrated / name)
    answers = capsys.readouterr().out.split("\n")
    assert len(answers) == 3
    assert answers[0] == answers[1]
    mue("freeze", "--ckpt_path", calibrated / "last.ckpt", "--out", calibrated / "again")
    assert "With 95% confidence" in capsys.readouterr().out
    for file in (calibrated / "bundle").rglob("*.*"):
        if file.name not in ("README.md", "manifest.json"):  # they say the folder's name
            assert (calibrated / "again" / file.relative_to(calibrated / "bundle")).read_bytes() == file.read_bytes()


def test_freeze_without_a_policy_is_full_depth(fitted, capsys):
    mue("freeze", "--ckpt_path", fitted / "last.ckpt", "--out", fitted / "bundle")
    assert "full depth" in capsys.readouterr().out
    mue("policy", "show", fitted / "bundle" / "policy.json")
    assert "no promise" in capsys.readouterr().out


def test_a_verified_bundle_answers_as_full_depth_does(fitted, shards, tmp_path, capsys):
    policy = ExitPolicy({"decoder": ExitRule.static(1), "vision": ExitRule.static(1)})
    policy.save(tmp_path / "policy.json")
    ckpt = ("--ckpt_path", fitted / "last.ckpt")
    mue("freeze", *ckpt, "--policy", tmp_path / "policy.json", "--out", tmp_path / "early")
    mue("freeze", *ckpt, "--policy", tmp_path / "policy.json", "--out", tmp_path / "verified", "--verified")
    assert "decoder: static 1; drafts, settled by the last layer" in capsys.readouterr().out
    ExitPolicy.full_depth().save(tmp_path / "full.json")
    mue("freeze", *ckpt, "--policy", tmp_path / "full.json", "--out", tmp_path / "full")
    pictures = [data for n, data in members_of(shards / "test-000.tar").items() if n.endswith(".png")][:6]
    for i, data in enumerate(pictures):
        (tmp_path / f"{i}.png").write_bytes(data)
    images = [argument for i in range(len(pictures)) for argument in ("--image", tmp_path / f"{i}.png")]
    answers = {}
    capsys.readouterr()
    for bundle in ("early", "verified", "full"):
        mue("generate", tmp_path / bundle, *images)
        answers[bundle] = capsys.readouterr().out
    assert answers["verified"] == answers["full"] != answers["early"]


def test_the_saved_recipe_of_a_run_is_one_again(fitted):
    saved = yaml.safe_load((fitted / "config.yaml").read_text())
    assert saved["model"]["exits"]["vision"] == [1]
    mue("validate", "-c", fitted / "config.yaml", "--trainer.callbacks", "null", "--ckpt_path", fitted / "last.ckpt")


def _printed(text, metric):
    """Return the value that Lightning's table of results gives to ``metric``."""
    line = next(line for line in text.splitlines() if metric in line)
    return float(line.replace("│", " ").split()[-1])
