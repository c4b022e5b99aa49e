"""A clock that does not depend on what else a machine does: a layer costs much and a signal little.

Which policies are searched, and so which is certified, follows from milliseconds; a test that names the outcome needs
the same ones each time.
"""

from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import pytest

from lightning_mue.callbacks import answering, embedding
from lightning_mue.latency import LatencyTable

LAYER, FIXED, SIGNAL, LEAVING = 1.0, 1.0, 0.05, 0.01


def steadied(table: LatencyTable) -> LatencyTable:
    """Return a measured table with made-up milliseconds."""
    streams = {
        name: replace(found, fixed_ms=FIXED, layer_ms=LAYER, exit_ms=LEAVING, exit_ms_of={}, signal_ms=cheap(found))
        for name, found in table.streams.items()
    }
    growing = tuple(LAYER + SIGNAL * (size - 1) for size in table.decoder.block_sizes)
    costs = {"layer_ms": growing, "base_ms": growing[: len(table.decoder.base_ms)], "cross_ms": SIGNAL}
    leaving = dict.fromkeys(table.decoder.exit_ms, LEAVING)
    decoder = replace(table.decoder, step_ms=FIXED, signal_ms=cheap(table.decoder), exit_ms=leaving, **costs)
    return replace(table, streams=streams, decoder=decoder)


def cheap(found):
    return dict.fromkeys(found.signal_ms, SIGNAL)


@contextmanager
def clock():
    """Measure, and believe other milliseconds."""
    answers, embeds = _steady(answering.measure_latency), _steady(embedding.measure_embedding)
    with (
        mock.patch.object(answering, "measure_latency", answers),
        mock.patch.object(embedding, "measure_embedding", embeds),
    ):
        yield


def _steady(measure):
    return lambda *given: steadied(measure(*given))


@pytest.fixture
def steady_clock():
    with clock():
        yield
