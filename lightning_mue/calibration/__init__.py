"""Thresholds with a guarantee: p-values, simulation, proposal and certification. numpy and scipy only."""

from lightning_mue.calibration.candidates import Candidate
from lightning_mue.calibration.certify import Provenance, Tested, certify, uncertified
from lightning_mue.calibration.decoded import Decoded
from lightning_mue.calibration.losses import METRICS, TestResult, check_promise, p_value
from lightning_mue.calibration.propose import Proposal, propose
from lightning_mue.calibration.rehearse import rehearse
from lightning_mue.calibration.sample_size import samples_needed, shortage
from lightning_mue.calibration.simulate import Simulation, simulate

__all__ = [
    "METRICS",
    "Candidate",
    "Decoded",
    "Proposal",
    "Provenance",
    "Simulation",
    "TestResult",
    "Tested",
    "certify",
    "check_promise",
    "p_value",
    "propose",
    "rehearse",
    "samples_needed",
    "shortage",
    "simulate",
    "uncertified",
]
