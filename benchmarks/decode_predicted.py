"""What the cost model predicts for lines of the decoders' cost table (``decode.py``), from a table of pieces alone."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from decode_case import START, Case
from decode_lines import SCHEDULES, Line

from lightning_mue.calibration.cost import predicted_ms
from lightning_mue.inference.profile import measure_decoder
from lightning_mue.inference.stopwatch import Stopwatch
from lightning_mue.latency import LatencyTable

REPEATS = 9


@torch.inference_mode()
def predictions(case: Case, lines: Mapping[str, Line]) -> dict[str, float]:
    """Return line -> milliseconds; of our engine's lines at batch 1, as its latency tables are."""
    found: dict[str, float] = {}
    for name, line in lines.items():
        if line.executor_of is None or line.full != name or case.batch != 1:
            continue
        silent = Stopwatch(torch.device("cpu"), False)
        executor = line.executor_of(case)(None, case.memory(line.precision), None, case.shape.steps, (), silent)
        pieces = measure_decoder(executor, START, case.shape.steps, REPEATS, case.clock)
        for schedule in SCHEDULES:
            depths = {"decoder": np.array(case.depths[schedule])}
            ms = predicted_ms(LatencyTable({}, pieces), depths)["decoder"].sum()
            found[name.replace("full", schedule)] = float(ms)
    return found
