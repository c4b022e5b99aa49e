"""How sessions of ONNX Runtime use threads."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnxruntime as ort


def session_options(threads: int) -> ort.SessionOptions:
    """Return the options of a session that is one of many.

    Every session has threads of its own. As they come they spin for a while after each call, and those of one layer
    would take the processor from the next: with two threads a decode took twenty times as long.

    Args:
        threads: of one call; 0 means one per core.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options
