"""Metrics of exits: how deep they lie, and what they change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad
from torchmetrics import Metric


class MeanExitDepth(Metric):
    """Mean exit depth of one stream, over samples or, in the decoder, over tokens, on every rank.

    One for each stream make a ``MetricCollection`` that is updated with ``ExitOutput.exit_depths``.

    Args:
        stream: whose depths to read.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    def __init__(self, stream: str) -> None:
        super().__init__()
        self.stream = stream
        # [sum of depths, their number]. The name is the stream's own: a MetricCollection takes metrics whose states
        # have the same names and once the same values for one.
        self._state = f"depth_{stream}"
        self.add_state(self._state, torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, exit_depths: Mapping[str, Tensor]) -> None:
        """Add the depths of a batch, ``[B]`` or ``[B, T]`` by stream; 0 is no depth (the row had ended).

        Raises:
            ValueError: there are no depths of the stream.
        """
        if self.stream not in exit_depths:
            raise ValueError(f"`exit_depths` must hold stream {self.stream!r}, got {list(exit_depths)}")
        depths = exit_depths[self.stream].double()
        getattr(self, self._state).add_(torch.stack([depths.sum(), (depths > 0).sum()]))

    def compute(self) -> Tensor:
        """Return the mean depth, a float64 scalar; NaN before the first one."""
        total, count = getattr(self, self._state)
        return total / count


class ExitAgreement(Metric):
    """Share of tokens, or of whole outputs, that are equal to full depth's, over all ranks.

    A token is compared with the one at its place; where one output is longer, its tokens find no equal. Start tokens
    and padding are not counted.

    Args:
        unit: ``token`` or ``output``. Both in one ``MetricCollection`` count only once.
        pad_id: fills sequences after their end.

    Raises:
        ValueError: an unknown unit.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    counts: Tensor

    def __init__(self, unit: Literal["token", "output"], pad_id: int) -> None:
        super().__init__()
        if unit not in ("token", "output"):
            raise ValueError(f"`unit` must be 'token' or 'output', got {unit!r}")
        self.unit, self.pad_id = unit, pad_id
        # [equal tokens, tokens], [equal outputs, outputs]
        self.add_state("counts", torch.zeros(2, 2, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, sequences: Tensor, full_sequences: Tensor) -> None:
        """Add a batch.

        Args:
            sequences: with exits, ``[B, 1 + T]``: start token, output, padding.
            full_sequences: of the same samples at full depth, likewise; it may be longer or shorter.

        Raises:
            ValueError: not the same number of sequences.
        """
        self.counts += agreement_counts(sequences, full_sequences, self.pad_id)

    def compute(self) -> Tensor:
        """Return the share, a float64 scalar; NaN before the first batch."""
        equal, count = self.counts[0 if self.unit == "token" else 1]
        return equal / count


def agreement_counts(sequences: Tensor, full_sequences: Tensor, pad_id: int) -> Tensor:
    """Return ``[[equal tokens, tokens], [equal outputs, outputs]]``, float64; arguments as of ``ExitAgreement``."""
    if len(sequences) != len(full_sequences):
        raise ValueError(f"got {len(sequences)} sequences with exits and {len(full_sequences)} at full depth")
    length = max(sequences.shape[1], full_sequences.shape[1])
    ours_BT, full_BT = (pad(s, (0, length - s.shape[1]), value=pad_id)[:, 1:] for s in (sequences, full_sequences))
    is_token_BT = (ours_BT != pad_id) | (full_BT != pad_id)
    equal_BT = ours_BT == full_BT
    tokens = torch.stack([(equal_BT & is_token_BT).sum(), is_token_BT.sum()])
    outputs = torch.stack([equal_BT.all(1).sum(), torch.tensor(len(equal_BT), device=equal_BT.device)])
    return torch.stack([tokens, outputs]).double()
