"""Lightning callbacks: thin hooks over inference and calibration."""

from lightning_mue.callbacks.calibrate_embeddings import CalibrateEmbeddings
from lightning_mue.callbacks.calibrate_exits import CalibrateExits
from lightning_mue.callbacks.collect_trace import CollectTrace
from lightning_mue.callbacks.last_checkpoint import LastCheckpoint
from lightning_mue.callbacks.log_exit_depth import LogExitDepth
from lightning_mue.callbacks.multi_exit_supervision import MultiExitSupervision
from lightning_mue.callbacks.obey_policy import ObeyPolicy
from lightning_mue.callbacks.write_predictions import WritePredictions

__all__ = [
    "CalibrateEmbeddings",
    "CalibrateExits",
    "CollectTrace",
    "LastCheckpoint",
    "LogExitDepth",
    "MultiExitSupervision",
    "ObeyPolicy",
    "WritePredictions",
]
