"""Every invariant is of every runtime and every backbone.

Of a test's settings two backbones see all, and each other one a third, another third for the next one; all of them with
``-m ""``.
"""

from collections import defaultdict
from pathlib import Path

import pytest

from lightning_mue.inference.runtime import RUNTIMES
from tests import zoo
from tests.invariants import policies

HERE, WHOLE = Path(__file__).parent, ("florence2", "coca")


@pytest.hookimpl(tryfirst=True)  # before marks are looked at
def pytest_collection_modifyitems(items):
    settings = defaultdict(list)
    for item in items:
        given = item.callspec.params if hasattr(item, "callspec") else {}
        named = [value for value in given.values() if isinstance(value, str) and value in zoo.BACKBONES]
        if item.path.parent == HERE and named and named[0] not in WHOLE:
            settings[item.path, item.originalname, named[0], given.get("runtime")].append(item)
    order = list(zoo.BACKBONES)
    for (*_, name, _), of_test in settings.items():
        kept = of_test[order.index(name) % min(3, len(of_test)) :: 3]
        for item in of_test:
            if item not in kept:
                item.add_marker(pytest.mark.long)


@pytest.fixture(params=list(RUNTIMES), autouse=True)
def runtime(request, monkeypatch):
    if request.param == "onnxruntime":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    monkeypatch.setattr(policies, "RUNTIME", request.param)
    return request.param
