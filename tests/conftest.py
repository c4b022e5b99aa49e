import copy
import os
from functools import cache
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from tests.runs import calibrated, calibrated_once, fitted, fitted_once, shards
from tests.steady import steady_clock

__all__ = ["calibrated", "calibrated_once", "fitted", "fitted_once", "shards", "steady_clock"]


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Tiny models gain nothing from threads, and waiting for each other on busy machines costs much."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Graphs that are kept must not be those of another version of the code; the workers of one run share them."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with mock.patch.dict(os.environ, XDG_CACHE_HOME=str(base / "cache")):
        yield


@pytest.fixture(autouse=True, scope="session")
def _operators_once():
    """torch looks all of ONNX's operators up at each export, which is half of what a small one takes."""
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        found = cache(ONNXRegistry.from_torchlib)
    except (ImportError, AttributeError):  # not installed, or moved: then they are looked up
        yield
        return

    def copied(*args, **kwargs):
        registry = copy.copy(found(*args, **kwargs))
        registry.functions = {name: [*known] for name, known in registry.functions.items()}  # exports may add to them
        return registry

    with mock.patch.object(ONNXRegistry, "from_torchlib", staticmethod(copied)):
        yield


@pytest.fixture(autouse=True)
def _own_environment():
    """Lightning's DDP leaves LOCAL_RANK behind; a process started later would wait for ranks that never come."""
    with mock.patch.dict(os.environ):
        yield
