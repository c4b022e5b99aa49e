"""Lightning callbacks: thin hooks over inference and calibration."""

from lightning_mue.callbacks.calibrate_exits import CalibrateExits
from lightning_mue.callbacks.collect_trace import CollectTrace

__all__ = ["CalibrateExits", "CollectTrace"]
