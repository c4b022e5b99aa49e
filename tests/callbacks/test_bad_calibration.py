"""What calibration is given by mistake: it says so before anything is decoded, or promises nothing."""

import json

import pytest

from lightning_mue import CalibrateExits

QUICK = {"max_new_tokens": 4, "latency_repeats": 1}


def test_no_validation_data(module, make_loader, make_trainer):
    with pytest.raises(ValueError, match=r"no validation data.*limit_val_batches"):
        make_trainer(CalibrateExits(metric="consistency", **QUICK), limit_val_batches=0).validate(module, make_loader())


def test_one_sample(module, make_loader, make_trainer):
    with pytest.raises(ValueError, match="Calibration needs samples to propose on and others to certify on"):
        make_trainer(CalibrateExits(metric="consistency", **QUICK)).validate(module, make_loader(1), verbose=False)


def test_a_metric_without_references(module, make_loader, make_trainer):
    with pytest.raises(ValueError, match=r"'anls' needs .*`processor`.*'consistency'"):
        make_trainer(CalibrateExits(metric="anls", **QUICK)).validate(module, make_loader(), verbose=False)


def test_a_confidence_that_no_data_can_reach():
    with pytest.raises(ValueError, match=r"`confidence_level` must lie in \(0, 1\), such as 0.95, got 1"):
        CalibrateExits(confidence_level=1.0)


def test_latencies_of_another_device(module, make_loader, make_trainer, tmp_path):
    first = CalibrateExits(metric="consistency", keep=0.5, lower_precision=[], **QUICK)
    make_trainer(first).validate(module, make_loader(), verbose=False)
    (path,) = (tmp_path / "run" / "calibration").glob("latency-*.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"device": "some other"}))
    with pytest.raises(ValueError, match=r"was measured on 'some other', this is .*; delete it"):
        make_trainer(CalibrateExits(metric="consistency", keep=0.5, lower_precision=[], **QUICK)).validate(
            module, make_loader(), verbose=False
        )
