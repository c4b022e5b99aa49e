"""Rehearsing: what simulation proposes is decoded on the same data, before other data is spent on testing it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lightning_mue.calibration.candidates import Candidate, Judge, chain_of, frontier_of
from lightning_mue.calibration.decoded import Decoded
from lightning_mue.calibration.propose import Proposal, of_groups
from lightning_mue.policy import ExitPolicy
from lightning_mue.trace import Trace


def rehearse(proposal: Proposal, trace: Trace, decode: Callable[[ExitPolicy], Decoded]) -> Proposal:
    """Return the proposal with chain and frontier made of what its candidates really did on the propose split.

    Simulation adds up the effects of streams, each tried alone. Together they may do more harm: a decoder that leaves
    early reads an early picture worse. A chain led by such a policy would end at its first test. Times and depths stay
    those that simulation predicts: a decoder that would leave later on an early picture costs more than they say.

    Args:
        proposal: of `propose`.
        trace: it was made of.
        decode: runs a policy on the trace's samples with the engine that ships.

    Raises:
        ValueError: a policy was decoded on other samples than the trace's.
    """
    trace = of_groups(Trace.merge([trace]), proposal.groups)
    judge = Judge(trace, proposal.promises, proposal.groups)

    def measured(candidate: Candidate) -> Candidate:
        found = decode(candidate.policy).in_order()
        if list(found.sample_ids) != list(trace.sample_ids):
            raise ValueError(
                f"Policy {candidate.policy.depths_in_words()!r} must be decoded on the {len(trace)} samples of the "
                f"trace, in which it was simulated; got {len(found.sample_ids)} samples, or others"
            )
        return judge.candidate(candidate.policy, found.scores, found.same, candidate.ms, candidate.depths)

    frontier = frontier_of([proposal.full_depth, *map(measured, proposal.worth_decoding)])
    return replace(proposal, chain=chain_of(frontier, proposal.full_depth.ms), frontier=frontier)
