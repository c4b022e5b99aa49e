"""The quickstart, made small: every step of the life cycle runs and leaves what it promises."""

import pytest

from lightning_mue import quickstart as module
from lightning_mue.export import load
from lightning_mue.policy import ExitPolicy


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PICTURES", {"train": 60, "val": 40, "test": 8})
        module.quickstart(folder, keep=0.9, seed=0, steps=4)
    return folder


def test_it_leaves_a_bundle_a_policy_and_a_page(out):
    policy = ExitPolicy.load(out / "policy.json")
    assert policy.certificate is not None
    assert load(out / "bundle").policy == policy
    page = (out / "report.html").read_text()
    for text in ("transformers, full depth", "static decoder depth 1", "all at first exit", "calibrated exits"):
        assert text in page
    assert "<script" not in page


def test_an_interrupted_one_goes_on(out, capsys):
    before = (out / "last.ckpt").stat().st_mtime_ns
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PICTURES", {"train": 60, "val": 40, "test": 8})
        module.quickstart(out, keep=0.9, seed=0, steps=4)  # all trained already: nothing is trained again
    assert (out / "last.ckpt").stat().st_mtime_ns == before
    assert "calibrated exits" in capsys.readouterr().out.replace("\n", " ")
