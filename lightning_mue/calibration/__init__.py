"""Thresholds with a guarantee: p-values, simulation, proposal and certification. numpy and scipy only."""

from lightning_mue.calibration.candidates import Candidate
from lightning_mue.calibration.certify import (
    Provenance,
    certify,
    groups_large_enough,
    split_hash,
    uncertified,
    worth_decoding,
)
from lightning_mue.calibration.decoded import Decoded
from lightning_mue.calibration.losses import TestResult, p_value
from lightning_mue.calibration.propose import Proposal, propose
from lightning_mue.calibration.rehearse import rehearse
from lightning_mue.calibration.sample_size import samples_needed, shortage
from lightning_mue.calibration.simulate import Simulation, simulate
from lightning_mue.calibration.tested import Tested, test_policy

__all__ = [
    "Candidate",
    "Decoded",
    "Proposal",
    "Provenance",
    "Simulation",
    "TestResult",
    "Tested",
    "certify",
    "groups_large_enough",
    "p_value",
    "propose",
    "rehearse",
    "samples_needed",
    "shortage",
    "simulate",
    "split_hash",
    "test_policy",
    "uncertified",
    "worth_decoding",
]
