"""Lower precision as one more way to be fast: it competes with leaving early, on equal terms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lightning_mue.calibration.candidates import Candidate
from lightning_mue.calibration.propose import Proposal, of_groups, timed_samples
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
    timed = timed_samples(of_groups(Trace.merge([trace]), proposal.groups))
    rows = {name: StreamRows.of(timed, name) for name in sorted(timed.streams)}

    def lowered(candidate: Candidate) -> Candidate:
        rules = candidate.policy.rules
        ms = sum(float(np.mean(stream_cost(r, rules.get(name), latency)[0])) for name, r in rows.items())
        return replace(candidate, policy=replace(candidate.policy, precision=precision), ms=ms)

    def faster(candidates: Sequence[Candidate]) -> list[Candidate]:
        return [twin for twin in map(lowered, candidates) if twin.ms < proposal.full_depth.ms]

    full = faster([proposal.full_depth])
    frontier = [*proposal.frontier, *full, *faster(proposal.frontier)]
    worth_decoding = [*proposal.worth_decoding, *full, *faster(proposal.worth_decoding)]
    return replace(proposal, frontier=frontier, worth_decoding=worth_decoding)
