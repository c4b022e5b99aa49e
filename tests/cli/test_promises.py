"""Several promises, groups and a budget, as they are written in a recipe."""

import json

import pytest
import yaml

from lightning_mue.metrics import DocumentFrequencies
from lightning_mue.policy import ExitPolicy
from lightning_mue.promise import Promise
from tests.runs import members_of, mue


def ask(folder, **init_args):
    """Write into the recipe what CalibrateExits is asked for."""
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["trainer"]["callbacks"][0]["init_args"] = {"latency_repeats": 1, "confidence_level": 0.5} | init_args
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def test_promises_in_a_recipe(fitted, shards, capsys, steady_clock):
    promises = [{"metric": "consistency", "keep": 0.3}, {"metric": "cider", "drop": 5.0, "cap": 8.0}]
    ask(fitted, promises=promises)
    mue("calibrate", "-c", fitted / "recipe.yaml")
    policy = ExitPolicy.load(fitted / "policy.json")
    asked = [Promise("consistency", keep=0.3), Promise("cider", drop=5.0, cap=8.0)]
    assert [e.promise for e in policy.certificate.evidence] == asked
    assert policy.certificate.kind == "certified"
    # The document frequencies are those of the training references, which calibrate nothing.
    records = [json.loads(d) for n, d in members_of(shards / "train-000.tar").items() if n.endswith(".json")]
    said = policy.certificate.decode["document_frequencies"]
    assert int(said.split()[0]) == sum(min(2, len(r["qa"])) for r in records)  # questions_per_picture is 2
    capsys.readouterr()
    mue("policy", "show", fitted / "policy.json")
    text = capsys.readouterr().out
    assert "* loses at most 5 of the full-depth cider (capped at 8): " in text
    assert "at most 50% of them would end with a policy that breaks the promise" in text
    mue("test", "-c", fitted / "recipe.yaml")


def test_frequencies_of_a_file_and_a_metric_of_the_corpus(fitted, capsys, steady_clock):
    DocumentFrequencies.from_references([["a red circle"], ["a blue square"]]).save(fitted / "df.json")
    ask(
        fitted,
        promises=[{"metric": "cider", "drop": 5.0}, {"metric": "bleu", "drop": 0.7}],
        frequencies=str(fitted / "df.json"),
    )
    mue("calibrate", "-c", fitted / "recipe.yaml")
    policy = ExitPolicy.load(fitted / "policy.json")
    assert policy.certificate.decode["document_frequencies"].startswith("2 pictures, ")
    assert policy.certificate.kind == "approximate"
    mue("policy", "show", fitted / "policy.json")
    assert "Approximately, as drawing the samples again tells it: with 50% confidence" in capsys.readouterr().out


def test_groups_in_a_recipe(fitted, shards):
    ask(fitted, promises=[{"metric": "consistency", "keep": 0.2}], group_by="level")
    mue("calibrate", "-c", fitted / "recipe.yaml")
    policy = ExitPolicy.load(fitted / "policy.json")
    assert policy.certificate.decode["group_by"] == "level"
    groups = {e.group for e in policy.certificate.evidence}
    assert len(groups) > 1
    assert policy.groups is None or set(policy.groups) == groups
    mue("test", "-c", fitted / "recipe.yaml")  # rows know their level
    mue("freeze", "--ckpt_path", fitted / "last.ckpt", "--out", fitted / "bundle")
    name, data = next((n, d) for n, d in members_of(shards / "test-000.tar").items() if n.endswith(".png"))
    (fitted / name).write_bytes(data)
    mue("generate", fitted / "bundle", "--image", fitted / name, "--group", "1")
    if policy.groups is not None:
        with pytest.raises(SystemExit, match=r"leaves early for the groups .* alone"):
            mue("generate", fitted / "bundle", "--image", fitted / name)


def test_a_budget_in_a_recipe(fitted):
    ask(fitted, metric="consistency", speedup=1.05)
    mue("calibrate", "-c", fitted / "recipe.yaml")
    certificate = ExitPolicy.load(fitted / "policy.json").certificate
    assert certificate.kind in ("certified", "full depth")
    assert certificate.promise.metric == "consistency"


@pytest.mark.parametrize(
    ("promise", "message"),
    [({"metric": "anls", "keep": 1.5}, r"`keep` must lie in \(0, 1\)"), ({"metric": "spice", "keep": 0.9}, "`metric`")],
)
def test_a_promise_that_cannot_be_meant(fitted, promise, message, capsys):
    ask(fitted, promises=[promise])
    with pytest.raises((SystemExit, ValueError)) as raised:
        mue("calibrate", "-c", fitted / "recipe.yaml")
    assert message.replace("\\", "") in capsys.readouterr().err + str(raised.value)
    assert not (fitted / "policy.json").exists()
