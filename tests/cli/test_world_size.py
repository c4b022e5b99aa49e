"""The same data and latency table give the same policy, byte for byte, on one process and on two as typed."""

import os
import subprocess
import sys

import pytest

from tests.runs import ROOT, copy_run


@pytest.mark.slow  # half a minute: two processes import torch
def test_two_processes_give_the_policy_of_one(tmp_path, calibrated_once):
    folder = copy_run(calibrated_once, tmp_path / "two")
    expected = (folder / "policy.json").read_bytes()
    (folder / "policy.json").unlink()
    for piece in (folder / "calibration").iterdir():
        if not piece.name.startswith("latency-"):
            piece.unlink()
    command = [sys.executable, "-m", "lightning_mue.cli", "calibrate", "-c", str(folder / "recipe.yaml")]
    command += ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "MEMBER: 2/2" in done.stderr
    names = {p.name for p in (folder / "calibration").iterdir()}
    assert names == {p.name for p in (calibrated_once / "calibration").iterdir()}  # no name knows the world size
    assert (folder / "policy.json").read_bytes() == expected
