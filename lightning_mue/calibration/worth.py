"""Exits that cannot win: deciding there costs more than all layers above, so they are not even tried."""

from __future__ import annotations

import numpy as np

from lightning_mue.calibration.cost import deciding_ms
from lightning_mue.calibration.rows import StreamRows
from lightning_mue.calibration.simulate import stream_cost
from lightning_mue.latency import LatencyTable
from lightning_mue.policy import SIGNAL_RANGES, ExitRule


def exits_that_pay(rows: StreamRows, latency: LatencyTable) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Return signal -> the exits at which asking it saves time if everything leaves there; the others, in words.

    Args:
        rows: of a stream, of the samples on which times are predicted.
        latency: measured costs.

    Raises:
        ValueError: a cost was not measured.
    """
    full_ms, units = stream_cost(rows, None, latency)[0].mean(), len(rows.sample) / rows.samples
    pay: dict[str, tuple[int, ...]] = {}
    refused = []
    for signal in sorted(rows.scores):
        pay[signal] = ()
        for k in rows.layers:
            always = ExitRule(signal, (k,), (SIGNAL_RANGES[signal][0],))
            if (gain_ms := full_ms - stream_cost(rows, always, latency)[0].mean()) > 0:
                pay[signal] += (k,)
                continue
            costs_ms = float(deciding_ms(latency, rows.name, always, np.array([k]))[0])
            refused.append(
                f"{rows.name}: the exit after layer {k} by {signal} costs {costs_ms:.3g} ms a "
                f"{'token' if rows.is_decoder else 'sample'} and can save {gain_ms / units + costs_ms:.3g} ms"
            )
    return pay, refused
