"""Every invariant is of every runtime."""

import pytest

from lightning_mue.inference.runtime import RUNTIMES
from tests.invariants import policies


@pytest.fixture(params=list(RUNTIMES), autouse=True)
def runtime(request, monkeypatch):
    if request.param == "onnxruntime":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    monkeypatch.setattr(policies, "RUNTIME", request.param)
    return request.param
