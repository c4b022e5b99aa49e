"""What was stopped in the middle goes on when the same command is typed again, and ends where it would have ended."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from lightning_mue.callbacks import collect_trace, decoding
from tests.runs import ROOT, PowerCut, copy_run, mue, tiny_recipe


def stopping_recipe(folder, shards, step, how="raise"):
    folder.mkdir(exist_ok=True)
    stop = {"step": step, "marker": str(folder / "stopped"), "how": how}
    callbacks = [{"class_path": "tests.runs.StopOnce", "init_args": stop}]
    return tiny_recipe(folder / "recipe.yaml", shards, folder, callbacks)


def assert_the_same_end(folder, whole):
    found, expected = (torch.load(f / "last.ckpt", weights_only=True) for f in (folder, whole))
    assert found["global_step"] == expected["global_step"] == 20
    for name, tensor in expected["state_dict"].items():
        assert torch.equal(found["state_dict"][name], tensor), name
    for mine, theirs in zip(found["optimizer_states"], expected["optimizer_states"], strict=True):
        for key, state in theirs["state"].items():
            assert all(torch.equal(mine["state"][key][k], v) for k, v in state.items())
    assert found["lr_schedulers"] == expected["lr_schedulers"]


# 8 steps an epoch and checkpoints at 6, 12, 18 and 20: stopped before the first, one epoch later, in the same epoch.
@pytest.mark.parametrize("step", [4, 10, 14])
def test_fit_goes_on_bit_for_bit(tmp_path, shards, fitted_once, step):
    recipe = stopping_recipe(tmp_path, shards, step)
    with pytest.raises(PowerCut):
        mue("fit", "-c", recipe)
    seen = (tmp_path / "last.ckpt").exists()
    assert seen == (step >= 6)
    if seen:  # no more than the steps since the last validation are lost (a stop right at it comes before it)
        assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == (step - 1) // 6 * 6
    mue("fit", "-c", recipe)
    assert_the_same_end(tmp_path, fitted_once)


def test_fit_goes_on_after_control_c(tmp_path, shards, fitted_once):
    recipe = stopping_recipe(tmp_path, shards, 8, "interrupt")
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as stopped:
            mue("fit", "-c", recipe)
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores it from the first one on
    assert stopped.value.code
    mue("fit", "-c", recipe)
    assert_the_same_end(tmp_path, fitted_once)


def test_fit_goes_on_after_a_kill(tmp_path, shards, fitted_once):
    command = [sys.executable, "-m", "lightning_mue.cli", "fit", "-c", stopping_recipe(tmp_path, shards, 8, "kill")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    killed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=240, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    mue("fit", "-c", tmp_path / "recipe.yaml")
    assert_the_same_end(tmp_path, fitted_once)


def test_a_finished_fit_does_nothing_and_more_steps_go_on(fitted):
    before = torch.load(fitted / "last.ckpt", weights_only=True)["state_dict"]
    mue("fit", "-c", fitted / "recipe.yaml")
    after = torch.load(fitted / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    mue("fit", "-c", fitted / "recipe.yaml", "--trainer.max_steps", 23)
    assert torch.load(fitted / "last.ckpt", weights_only=True)["global_step"] == 23


def test_last_is_the_last_even_if_nothing_gets_better(fitted_once):
    steps = {
        name: torch.load(fitted_once / f"{name}.ckpt", weights_only=True)["global_step"] for name in ("best", "last")
    }
    assert steps["last"] == 20
    assert steps["best"] in (6, 12, 18)


_record, _decode = collect_trace.record, decoding.SplitDecoder._decode


class Counter:
    """Counts calls of a function, and breaks one of them."""

    def __init__(self, function, breaks_at=None):
        self.function, self.breaks_at, self.calls = function, breaks_at, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls == self.breaks_at:
            raise PowerCut
        return self.function(*args, **kwargs)


def counted(monkeypatch, record_breaks=None, decode_breaks=None):
    """Count what records a batch and what decodes one for the certificate."""
    recorder = Counter(_record, record_breaks)
    decoder = Counter(_decode, decode_breaks)
    monkeypatch.setattr(collect_trace, "record", recorder)
    monkeypatch.setattr(decoding.SplitDecoder, "_decode", lambda self, *args: decoder(self, *args))
    return recorder, decoder


def test_calibrate_goes_on_from_its_journal(tmp_path, fitted_once, monkeypatch):
    recorder, decoder = counted(monkeypatch)
    whole = copy_run(fitted_once, tmp_path / "whole")
    mue("calibrate", "-c", whole / "recipe.yaml")
    records, decodes = recorder.calls, decoder.calls
    batches = len(list((whole / "calibration").glob("trace-*")))
    assert records == batches >= 3
    assert decodes >= 3 * batches  # full depth and at least two policies
    folder = copy_run(fitted_once, tmp_path / "run")
    (folder / "calibration").mkdir()
    for latency in (whole / "calibration").glob("latency-*.json"):
        (folder / "calibration" / latency.name).write_bytes(latency.read_bytes())

    recorder, _ = counted(monkeypatch, record_breaks=3)
    with pytest.raises(PowerCut):
        mue("calibrate", "-c", folder / "recipe.yaml")
    assert len(list((folder / "calibration").glob("trace-*"))) == 2
    assert not (folder / "policy.json").exists()

    recorder, decoder = counted(
        monkeypatch, decode_breaks=batches + 2
    )  # in the middle of the first policy after full depth
    with pytest.raises(PowerCut):
        mue("calibrate", "-c", folder / "recipe.yaml")
    assert (recorder.calls, decoder.calls) == (records - 2, batches + 2)
    assert len(list((folder / "calibration").glob("decoded-*"))) == batches + 1
    assert not (folder / "policy.json").exists()

    recorder, decoder = counted(monkeypatch)
    mue("calibrate", "-c", folder / "recipe.yaml")
    assert (recorder.calls, decoder.calls) == (0, decodes - batches - 1)
    assert (folder / "policy.json").read_bytes() == (whole / "policy.json").read_bytes()

    recorder, decoder = counted(monkeypatch)
    # Another promise needs no other recording.
    mue("calibrate", "-c", folder / "recipe.yaml", "--keep", 0.55, "--reuse", "spend")
    assert recorder.calls == 0
    assert not list(folder.rglob(".*"))  # nothing half-written is left


def test_a_broken_piece_of_the_journal_is_made_again(calibrated, monkeypatch):
    policy = (calibrated / "policy.json").read_bytes()
    for kind in ("trace", "decoded"):
        piece = min((calibrated / "calibration").glob(f"{kind}-*"))
        piece.write_bytes(piece.read_bytes()[:100])
    recorder, decoder = counted(monkeypatch)
    mue("calibrate", "-c", calibrated / "recipe.yaml")
    assert (recorder.calls, decoder.calls) == (1, 1)
    assert (calibrated / "policy.json").read_bytes() == policy


@pytest.mark.parametrize("other", ["data", "weights"])
def test_the_journal_knows_weights_and_data(calibrated, monkeypatch, other):
    recorder, _ = counted(monkeypatch, record_breaks=1)
    mue("calibrate", "-c", calibrated / "recipe.yaml")
    assert recorder.calls == 0
    change = ["--data.select", 0.25] if other == "data" else ["--ckpt_path", calibrated / "best.ckpt"]
    with pytest.raises(PowerCut):
        mue("calibrate", "-c", calibrated / "recipe.yaml", *change)
