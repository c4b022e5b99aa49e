"""SmallHead: the vocabulary head of greedy decoding where weights are few, and bounds would cost more than scores.

Shapes: ``R`` rows, ``D`` width, ``V`` vocabulary. No torch here.
"""

from __future__ import annotations

import numpy as np

from lightning_mue.inference.screened_head import Process

MOST_WEIGHTS = 1 << 17
"""Numbers in the matrix; up to here scoring all tokens was faster for 1 to 32 rows."""


class SmallHead:
    """The arg-max that `ScreenedHead` gives: of scores summed in float64, rounded once to float32.

    Args:
        weight_VD: float32; copied.
        bias_V: float32 or None; ``-inf`` bars a token.
    """

    def __init__(self, weight_VD: np.ndarray, bias_V: np.ndarray | None = None) -> None:
        self._weight_DV = np.ascontiguousarray(weight_VD.T, np.float64)
        self._bias_V = np.zeros(len(weight_VD)) if bias_V is None else bias_V.astype(np.float64)

    def argmax(self, h_RD: np.ndarray, process: Process | None = None) -> np.ndarray:
        """Return the best token of each row, int64 ``[R]``.

        Args:
            h_RD: float32 states.
            process: logits processors.

        Raises:
            ValueError: states are not finite.
        """
        if not np.isfinite(h_RD).all():
            raise ValueError("States must be finite, got nan or inf: look at the layers below the head")
        score_RV = (h_RD @ self._weight_DV + self._bias_V).astype(np.float32)
        if process is not None:
            score_RV = process(np.arange(len(h_RD)), score_RV)
        return score_RV.argmax(1)
