"""Several processes of one job, each as a launcher would start it; forked, so that none imports torch again."""

import contextlib
import logging
import multiprocessing
import os
import socket
import sys
import time

import torch


def start(folder, world, function, environments=None, fresh=False):
    """Start ``function()`` as ranks 0 to ``world - 1``; they write to ``rank<k>.log`` in the folder.

    Ranks that train must be ``fresh``, and their function one that can be pickled: autograd refuses to run in a fork of
    a process in which it has threads of its own.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    ours = [{"LOCAL_RANK": str(k), "NODE_RANK": "0", "WORLD_SIZE": str(world)} for k in range(world)]
    context, started = multiprocessing.get_context("spawn" if fresh else "fork"), []
    for rank, environment in enumerate(environments or ours):
        arguments = (function, common | environment, folder / f"rank{rank}.log")
        started.append(context.Process(target=_run, args=arguments))
        started[-1].start()
    return started


def ended(folder, started, timeout=120):
    """Wait until all have ended, or for so long; return exit codes (None: it had not) and what they wrote."""
    until = time.monotonic() + timeout
    for process in started:
        process.join(max(0.0, until - time.monotonic()))
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
        process.join()
    return codes, [(folder / f"rank{rank}.log").read_text() for rank in range(len(started))]


def run(folder, world, function, environments=None, timeout=120, fresh=False):
    """Start ranks and wait for them."""
    return ended(folder, start(folder, world, function, environments, fresh), timeout)


def my_rank():
    """This process's, before and after there is a process group."""
    return int(os.environ.get("SLURM_PROCID", os.environ.get("LOCAL_RANK", "0")))


@contextlib.contextmanager
def group(**options):
    """A gloo process group of the ranks, without Lightning."""
    world = int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group("gloo", rank=my_rank(), world_size=world, **options)
    yield
    torch.distributed.destroy_process_group()


def _run(function, environment, log):
    os.environ.update(environment)
    with open(log, "w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)  # not the streams that pytest captures
    logging.getLogger("lightning.fabric.utilities.distributed").addHandler(logging.StreamHandler())  # who is who
    function()
