"""Options deep in a backbone's config change one value, and leave its neighbours as the recipe has them."""

import pytest
import yaml

from lightning_mue.nested_options import whole_parts
from tests.runs import ROOT, mue

RECIPE = str(ROOT / "recipes" / "sroie_lines_trocr.yaml")
DECODER = yaml.safe_load((ROOT / "recipes" / "sroie_lines_trocr.yaml").read_text())["model"]["backbone"]["decoder"]


def printed(capsys, *args):
    """Return the backbone's config with which `fit` would run."""
    capsys.readouterr()
    with pytest.raises(SystemExit):
        mue("fit", "-c", RECIPE, *args, "--print_config")
    return yaml.safe_load(capsys.readouterr().out)["model"]["backbone"]


@pytest.mark.parametrize("args", [("--model.backbone.decoder.dropout", 0.2), ("--model.backbone.decoder.dropout=0.2",)])
def test_one_value_is_changed(capsys, args):
    found = printed(capsys, *args, "--model.backbone.decoder.init_std=1e-2", "--model.backbone.position_std", 0.3)
    assert found["decoder"] == DECODER | {"dropout": 0.2, "init_std": 0.01}
    assert found["position_std"] == 0.3
    assert found["encoder"] == printed(capsys)["encoder"]


def test_the_last_config_counts_and_other_arguments_stay(tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text("model: {backbone: {decoder: {d_model: 8, more: {a: 1}}}}")
    args = ["fit", "-c", RECIPE, f"--config={other}", "--model.backbone.decoder.more.b", "2", "--trainer.max_steps=3"]
    assert whole_parts(args) == [
        *["fit", "-c", RECIPE, "--config", str(other), "--trainer.max_steps=3"],
        *["--model.backbone.decoder", '{"d_model": 8, "more": {"a": 1, "b": 2}}'],
    ]
    given = ["fit", "-c", RECIPE, "--model.backbone.decoder", '{"d_model": 8}', "--model.backbone.decoder.more", "1"]
    assert whole_parts(given)[-2:] == ["--model.backbone.decoder", '{"d_model": 8, "more": 1}']
    plain = ["fit", "--model.backbone", "folder", "--print_config", "--model.backbone.decoder", "{}"]
    assert whole_parts(plain) == plain


def test_what_cannot_be_changed_is_named():
    with pytest.raises(ValueError, match=r"decoder.dropout.rate lies in 0.1, which is no mapping"):
        whole_parts(["fit", "-c", RECIPE, "--model.backbone.decoder.dropout.rate", "1"])
    with pytest.raises(ValueError, match=r"decoder\.dropout needs a value"):
        whole_parts(["fit", "--model.backbone.decoder.dropout"])
