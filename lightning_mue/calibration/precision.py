"""Lower precision as one more way to be fast: it competes with leaving early, on equal terms."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lightning_mue.calibration.candidates import Candidate
from lightning_mue.calibration.propose import Proposal, timed_samples
from lightning_mue.calibration.rows import StreamRows
from lightning_mue.calibration.simulate import stream_cost
from lightning_mue.latency import LatencyTable
from lightning_mue.trace import Trace


def with_precision(proposal: Proposal, trace: Trace, latency: LatencyTable, precision: str) -> Proposal:
    """Return the proposal with what is worth decoding, and full depth, also in a lower precision.

    Simulation cannot know what rounding changes: the same is assumed, and rehearsing shows what it really does.

    Args:
        proposal: of `propose`.
        trace: it was made of.
        latency: measured in that precision.
        precision: as in ``ExitPolicy``.
    """
    timed = timed_samples(trace)
    rows = {name: StreamRows.of(timed, name) for name in sorted(timed.streams)}

    def lowered(candidate: Candidate) -> Candidate:
        rules = candidate.policy.rules
        ms = sum(float(np.mean(stream_cost(r, rules.get(name), latency)[0])) for name, r in rows.items())
        return replace(candidate, policy=replace(candidate.policy, precision=precision), ms=ms)

    twins = [lowered(candidate) for candidate in (proposal.full_depth, *proposal.worth_decoding)]
    faster = [twin for twin in twins if twin.ms < proposal.full_depth.ms]
    return replace(proposal, worth_decoding=[*proposal.worth_decoding, *faster])
