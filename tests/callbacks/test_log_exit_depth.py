import copy
import csv
import itertools

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lightning_mue import CalibrateExits, ExitEngine, ExitPolicy, ExitRule, LogExitDepth
from lightning_mue.callbacks import log_exit_depth
from lightning_mue.callbacks.log_exit_depth import depth_counts
from lightning_mue.inference.record import record

from .conftest import BATCH, SAMPLES, TOKENS, Foreign

STATIC = ExitPolicy({"vision": ExitRule.static(2), "decoder": ExitRule.static(1)})


def half_leaves(model, batch):
    """A policy under which about half of what reaches an exit leaves there."""
    ids, nothing = batch["sample_id"], lambda sequences: {}
    trace = record(model, batch, ids, ids, nothing, TOKENS)
    rules = {}
    for name, stream in trace.streams.items():
        scores = stream.scores["similarity"].reshape(-1, len(stream.layers))
        rules[name] = ExitRule("similarity", stream.layers, tuple(np.median(scores[scores[:, 0] != 0], axis=0)))
    return ExitPolicy(rules)


def logged(trainer):
    return {k.removeprefix("exit_depth/"): float(v) for k, v in trainer.callback_metrics.items() if "exit_depth" in k}


def validate(make_trainer, module, loader, *callbacks, **options):
    trainer = make_trainer(*callbacks, **options)
    trainer.validate(module, loader, verbose=False)
    return logged(trainer)


def test_static_depths(module, make_loader, make_trainer, tmp_path):
    STATIC.save(tmp_path / "policy.json")
    found = [
        validate(make_trainer, module, make_loader(), LogExitDepth(policy=p, max_new_tokens=TOKENS))
        for p in (STATIC, str(tmp_path / "policy.json"))
    ]
    assert found[0] == found[1]
    assert found[0] == {
        "vision": 2,
        "vision_1": 0,
        "vision_2": 1,
        "vision_3": 0,
        "vision_4": 0,
        "encoder": 4,
        "encoder_1": 0,
        "encoder_2": 0,
        "encoder_3": 0,
        "encoder_4": 1,
        "decoder": 1,
        "decoder_1": 1,
        "decoder_2": 0,
        "decoder_3": 0,
        "decoder_4": 0,
        "decoder_5": 0,
    }


def test_is_what_the_engine_does_on_the_first_batches(module, make_loader, make_trainer):
    policy = half_leaves(module.model, next(iter(make_loader())))
    found = validate(make_trainer, module, make_loader(), LogExitDepth(policy=policy, batches=2, max_new_tokens=TOKENS))
    engine = ExitEngine(module.model, policy)
    batches = list(itertools.islice(make_loader(), 2))
    for stream, last in (("vision", 4), ("encoder", 4), ("decoder", 5)):
        depths = [engine.generate(TOKENS, **batch).exit_depths[stream].numpy().ravel() for batch in batches]
        taken = np.concatenate(depths)
        taken = taken[taken > 0]
        assert len(set(taken)) > 1
        assert found[stream] == pytest.approx(taken.mean())
        for k in range(1, last + 1):
            assert found[f"{stream}_{k}"] == pytest.approx((taken == k).mean())


def test_full_depth_is_logged_without_decoding(module, make_loader, make_trainer, monkeypatch):
    monkeypatch.setattr(log_exit_depth, "ExitEngine", None)
    found = validate(make_trainer, module, make_loader(), LogExitDepth())
    assert {k: v for k, v in found.items() if v} == {
        "vision": 4,
        "vision_4": 1,
        "encoder": 4,
        "encoder_4": 1,
        "decoder": 5,
        "decoder_5": 1,
    }


def test_follows_the_calibration_beside_it(module, make_loader, make_trainer, steady_clock):
    calibrate = CalibrateExits(keep=0.05, metric="consistency", max_new_tokens=TOKENS, latency_repeats=1)
    found = validate(make_trainer, module, make_loader(), calibrate, LogExitDepth(batches=SAMPLES))
    assert not calibrate.policy.is_full_depth
    again = validate(make_trainer, module, make_loader(), LogExitDepth(None, calibrate.policy, SAMPLES, TOKENS))
    assert found == again


def test_names_of_a_projects_batches_are_those_of_the_calibration(module, make_trainer):
    class Renamed(Foreign):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            return {"image": sample.pop("pixel_values")} | sample

    calibrate = CalibrateExits(keep=0.05, max_new_tokens=TOKENS, latency_repeats=1, inputs={"pixel_values": "image"})
    loader = DataLoader(Renamed(), BATCH)
    found = validate(make_trainer, module, loader, calibrate, LogExitDepth())
    alone = LogExitDepth(None, calibrate.policy, 4, TOKENS, {"pixel_values": "image"})
    assert found == validate(make_trainer, module, loader, alone)


def test_before_the_calibration_it_would_be_late(module, make_loader, make_trainer):
    calibrate = CalibrateExits(keep=0.05, metric="consistency", max_new_tokens=TOKENS, latency_repeats=1)
    with pytest.warns(UserWarning, match="LogExitDepth comes before CalibrateExits"):
        found = validate(make_trainer, module, make_loader(), LogExitDepth(), calibrate)
    assert found["decoder"] == 5


def test_in_fit_after_each_validation_in_any_logger_and_not_in_the_sanity_check(
    module, make_loader, make_trainer, tmp_path, monkeypatch
):
    calls = []
    plain = ExitEngine.generate
    monkeypatch.setattr(log_exit_depth.ExitEngine, "generate", lambda *a, **k: calls.append(1) or plain(*a, **k))
    callback = LogExitDepth(policy=STATIC, batches=1, max_new_tokens=2)
    options = {"max_steps": 4, "val_check_interval": 2, "num_sanity_val_steps": 2, "logger": CSVLogger(tmp_path)}
    kept = []
    check = LambdaCallback(on_sanity_check_end=lambda *_: kept.append(list(callback._kept)))
    trainer = make_trainer(callback, check, **options)
    was_training = module.model.train().training
    trainer.fit(module, make_loader(), make_loader(24))
    assert len(calls) == 2
    assert module.model.training == was_training
    assert kept == [[]]
    assert callback._kept == []
    rows = list(csv.DictReader((tmp_path / "lightning_logs" / "version_0" / "metrics.csv").open()))
    assert [float(row["exit_depth/vision"]) for row in rows if row.get("exit_depth/vision")] == [2, 2]


def test_ended_rows_have_no_depth():
    assert depth_counts([torch.tensor([[1, 2, 0], [3, 0, 0]]), torch.tensor([[3, 4, 4]])], 5) == [0, 1, 1, 2, 2, 0]
    assert depth_counts([], 2) == [0, 0, 0]


def test_a_policy_of_other_weights_is_only_looked_at(module, make_loader, make_trainer):
    policy = copy.copy(STATIC)
    object.__setattr__(policy, "fingerprint", "of other weights")
    assert validate(make_trainer, module, make_loader(), LogExitDepth(policy=policy, max_new_tokens=2))["vision"] == 2
