"""Several processes calibrate as one does, byte for byte; and when one of them stops, the others stop and say why."""

import os
import shutil
import signal
import subprocess
import sys
from unittest import mock

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, IterableDataset

from lightning_mue import CalibrateExits, ExitPolicy
from lightning_mue.callbacks import collect_trace, decoding
from tests import ranks
from tests.callbacks.conftest import TOKENS, Foreign, Plain, make_trainer
from tests.runs import ROOT, copy_run, mue

__all__ = ["make_trainer"]

DDP = ROOT / "recipes" / "cluster" / "ddp.yaml"
BROKEN = "the picture of sample 7 is broken"
RECORD, DECODE = collect_trace.record, decoding.SplitDecoder._decode


def calibrate(folder, world, *options, environments=None):
    def function():
        mue("calibrate", "-c", folder / "recipe.yaml", "-c", DDP, "--trainer.devices", world, *options)

    return ranks.run(folder, world, function, environments)


def pieces(folder, kind=""):
    return {path.name for path in (folder / "calibration").glob(f"{kind}*")}


def assert_the_same(folder, expected):
    assert (folder / "policy.json").read_bytes() == (expected / "policy.json").read_bytes()
    assert pieces(folder) == pieces(expected)


def take_latency(to, of):
    """Give a run that has no journal the latency tables of another, and nothing else."""
    (to / "calibration").mkdir(parents=True)
    for table in (of / "calibration").glob("latency-*"):
        shutil.copy(table, to / "calibration")


@pytest.fixture
def run(tmp_path, fitted_once, calibrated_once):
    folder = copy_run(fitted_once, tmp_path / "run")
    take_latency(folder, calibrated_once)
    return folder


# There are 5 batches, so three of four ranks repeat one. Two processes: below, and in test_world_size.py as typed.
@pytest.mark.slow
def test_four_processes_give_the_policy_of_one(run, calibrated_once):
    codes, said = calibrate(run, 4)
    assert codes == [0] * 4, said
    assert all(f"MEMBER: {rank + 1}/4" in text for rank, text in enumerate(said))
    assert_the_same(run, calibrated_once)


def test_what_srun_sets_is_enough(run, calibrated_once):
    job = {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "mue", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    job |= {"SLURM_NNODES": "1", "SLURM_NODEID": "0"}
    tasks = [job | {"SLURM_PROCID": str(k), "SLURM_LOCALID": str(k)} for k in range(2)]
    codes, said = calibrate(run, 2, environments=tasks)
    assert codes == [0, 0], said
    assert "MEMBER: 2/2" in said[1]
    assert_the_same(run, calibrated_once)


@pytest.mark.slow  # half a minute: the processes import torch
def test_torchrun(run, calibrated_once):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "lightning_mue.cli", "calibrate", "-c", run / "recipe.yaml", "-c", DDP]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*map(str, command), "--trainer.devices", "2"]
    try:
        code, said = in_time(command, environment, 150)
    except subprocess.TimeoutExpired:  # seen once, beside another run of ranks; what was recorded is kept
        code, said = in_time(command, environment, 150)
    assert code == 0, said[-3000:]
    assert_the_same(run, calibrated_once)


def in_time(command, environment, seconds):
    """Run a command; if it takes too long, end it with all the processes that it started."""
    how = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **how) as process:
        try:
            _, said = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, said


def breaking(name, rank, how):
    """Patch what records or decodes a batch so that its second call breaks on one rank."""
    owner, function = {"record": (collect_trace, RECORD), "_decode": (decoding.SplitDecoder, DECODE)}[name]
    calls = []

    def breaks(*args, **kwargs):
        calls.append(name)
        if len(calls) == 2 and ranks.my_rank() == rank:
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError(BROKEN)
        return function(*args, **kwargs)

    return mock.patch.object(owner, name, breaks)


@pytest.mark.parametrize(
    ("name", "rank", "how"), [("record", 1, "raise"), ("_decode", 0, "raise"), ("_decode", 1, "kill")]
)
def test_when_a_rank_stops_all_stop_and_nothing_is_lost(run, calibrated_once, name, rank, how):
    with breaking(name, rank, how):
        codes, said = calibrate(run, 2)
    assert codes[1 - rank] == 1, said
    assert codes[rank] == (1 if how == "raise" else -signal.SIGKILL), said
    if how == "raise":
        assert f"ValueError: {BROKEN}" in said[rank]
    if name == "_decode":  # while ranks record, they wait for each other in Lightning's words, not in ours
        why = f"rank {rank} stopped: ValueError: {BROKEN}" if how == "raise" else "one of them has died"
        assert "RankFailed: " in said[1 - rank]
        assert why in said[1 - rank]
    before = pieces(run)
    assert len(before) > 1
    assert not (run / "policy.json").exists()
    codes, said = calibrate(run, 2)  # the same command again
    assert codes == [0, 0], said
    assert before < pieces(run)
    assert_the_same(run, calibrated_once)


class OnOneRank(IterableDataset):
    """All samples come to rank 1, if there is one."""

    def __iter__(self):
        samples = Foreign()
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 or ranks.my_rank() == 1:
            yield from (samples[i] for i in range(len(samples)))


@pytest.mark.parametrize(
    "make", [lambda: DataLoader(Foreign(25), 1), lambda: DataLoader(OnOneRank(), 12)], ids=["padded", "rank 0 has none"]
)
def test_loaders_that_are_not_ours(tmp_path, make_trainer, steady_clock, make):
    """A sampler repeats a sample where ranks would have unequal numbers; a stream may leave a rank out."""

    def validate(root, **options):
        callback = CalibrateExits(metric="consistency", keep=0.3, max_new_tokens=TOKENS, latency_repeats=1)
        make_trainer(callback, default_root_dir=root, **options).validate(Plain(), make(), verbose=False)

    one, two = tmp_path / "one", tmp_path / "two"
    codes, said = ranks.run(tmp_path, 2, lambda: validate(two, devices=2, strategy="ddp"))
    assert codes == [0, 0], said
    assert "MEMBER: 2/2" in said[1]
    validate(one)
    assert_the_same(two, one)
    assert ExitPolicy.load(two / "policy.json").certificate.kind == "certified"


class Sharded(Plain):
    """As FSDP2 wants it: the strategy makes the mesh, the module shards itself."""

    def configure_model(self):
        for module in [m for m in self.model.modules() if isinstance(m, torch.nn.Linear)]:
            fully_shard(module, mesh=self.device_mesh["data_parallel"])


def test_a_sharded_model_is_refused_before_anything_is_recorded(tmp_path, make_trainer):
    def validate():
        callback = CalibrateExits(metric="consistency", max_new_tokens=TOKENS)
        strategy = ModelParallelStrategy(process_group_backend="gloo")
        trainer = make_trainer(callback, default_root_dir=tmp_path / "run", devices=2, strategy=strategy)
        trainer.validate(Sharded(), DataLoader(Foreign(), 12), verbose=False)

    codes, said = ranks.run(tmp_path, 2, validate)
    assert codes == [1, 1], said
    assert all("ValueError: Calibration needs the whole model on every rank" in text for text in said)
    assert not (tmp_path / "run" / "calibration").exists()
