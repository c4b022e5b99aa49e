"""Rows of the decoders' cost table (``decode.py``) that nothing decodes: what leaving early could save at best.

``<executor> ideal`` is an executor's own full depth with the layers' time cut to the share of (position, layer) pairs
that the ragged depths ask for: no catching up, no other upkeep. ``limit <precision> <schedule>`` is the time that
reading the weights and multiplying with them takes as fast as this machine does either (``lightning_mue.benchmark``).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from decode_case import Case, just_in_time_pairs
from decode_lines import Answer
from decode_measure import Measured

from lightning_mue.backbones import view
from lightning_mue.benchmark.limits import HEAD, Machine, decoder_runs, least_seconds
from lightning_mue.benchmark.machine import measure_machine
from lightning_mue.benchmark.work import decoder_work

PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8"}


def ideal_rows(case: Case, found: Mapping[str, Measured]) -> dict[str, Measured]:
    """Return the ideal of each executor that was measured."""
    depths = case.depths["ragged"]
    pairs = sum(map(sum, depths))
    share = pairs / (case.shape.layers * case.shape.steps * case.batch)
    rows = {}
    for name, full in found.items():
        if full.full == name:
            layers = full.parts["layers"]
            parts = {**full.parts, "layers": layers * share}
            answer = Answer([], depths, pairs, cache=full.answer.cache)
            rows[f"{name.removesuffix(' full')} ideal"] = Measured(answer, full.ms - layers * (1 - share), parts, name)
    return rows


def limit_rows(case: Case, machines: Mapping[str, Machine]) -> dict[str, Measured]:
    """Return the limits of full depth and of the ragged depths.

    Args:
        case: what is decoded.
        machines: precision -> what the machine does in it.
    """
    model = case.model()
    work = decoder_work(model, view(model).decoder, case.memory("fp32")[:1])
    rows = {}
    for precision, name in PRECISIONS.items():
        for schedule in ("full", "ragged"):
            runs = decoder_runs(work, case.depths[schedule])
            seconds = least_seconds(runs, machines[name], machines[HEAD])
            answer = Answer([], case.depths[schedule], just_in_time_pairs(case.depths[schedule]))
            parts = {part: np.array([of_part * 1e3]) for part, of_part in seconds.items()}
            rows[f"limit {precision} {schedule}"] = Measured(
                answer, sum(parts.values()), parts, f"limit {precision} full"
            )
    return rows


def machines(case: Case) -> dict[str, Machine]:
    """Measure the machine in each precision, reading as much as the decoder and its head weigh."""
    model = case.model()
    parts = (model.model.language_model.decoder, model.lm_head)
    weights = sum({id(p): p.numel() for part in parts for p in part.parameters()}.values())  # the head's are tied
    return {name: measure_machine(name, weights, clock=case.clock) for name in PRECISIONS.values()}
