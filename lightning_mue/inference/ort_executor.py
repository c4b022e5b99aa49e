"""OrtExecutor: the decoder through ONNX Runtime, for CPUs. Same interface, schedule and signals as TorchExecutor.

All pending (row, position) pairs of a layer go through its matrices in one call, wherever each row's frontier lies.
Attention alone looks at rows one by one, on K/V that never move.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_mue.inference.ragged import attend, to_bfloat16
from lightning_mue.inference.schedule import Block
from lightning_mue.inference.sessions import DecoderSessions
from lightning_mue.inference.torch_executor import Index, Position, TorchExecutor


class OrtExecutor(TorchExecutor):
    """One batch's decode.

    Args:
        sessions: the decoder's.
        *args: as of `TorchExecutor`; the memory must be float32 on the CPU.
    """

    def __init__(self, sessions: DecoderSessions, *args: Any) -> None:
        super().__init__(*args)
        self._sessions = sessions
        self._heads = (-1, self._decoder.num_heads, self._decoder.head_dim)
        mask = self._memory_mask
        self._bias_BS = None if mask is None else np.ascontiguousarray(mask[:, 0, 0].numpy())

    def run_layer(self, layer: int, pending: Sequence[Block]) -> None:
        """Push all pending positions through one layer, together."""
        sessions, threads = self._sessions.layers[layer - 1], self._sessions.threads
        for _, _, rows in pending:
            self._project_memory(layer, rows)
        with self._watch.part("layers"):
            rows_N, positions_N = _pairs(pending)
            h_ND = self.states[layer - 1].numpy()[rows_N, positions_N]
            query_ND, key_ND, value_ND = sessions.before(h_ND)
            keys_BHTd, values_BHTd = self._keys[layer].numpy(), self._values[layer].numpy()
            keys_BHTd[rows_N, :, positions_N] = key_ND.reshape(self._heads)
            values_BHTd[rows_N, :, positions_N] = value_ND.reshape(self._heads)
            read = attend(
                query_ND.reshape(self._heads), keys_BHTd, values_BHTd, rows_N, positions_N + 1, threads=threads
            )
            h_ND, query_ND = sessions.between(h_ND, read.reshape(h_ND.shape))
            key_BHSd, value_BHSd = self._memory_arrays(layer)
            lengths_N = np.full_like(rows_N, key_BHSd.shape[2])
            read = attend(
                query_ND.reshape(self._heads), key_BHSd, value_BHSd, rows_N, lengths_N, self._bias_BS, threads=threads
            )
            (h_ND,) = sessions.after(h_ND, read.reshape(h_ND.shape))
            self.states[layer].numpy()[rows_N, positions_N] = h_ND

    def _memory_arrays(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        stored = self._memory_kv[layer]
        assert stored is not None
        key, value = (kv.numpy() for kv in stored)
        return (key, value) if key.dtype == np.float32 else (key.view(np.uint16), value.view(np.uint16))

    def memory_rows(self, layer: int, memory_RSD: Tensor) -> tuple[Tensor, Tensor]:
        """Return K and V; beside matrices of 8 bits they are kept in 16, for reading them is most of the work."""
        found = self._sessions.layers[layer - 1].memory(memory_RSD.contiguous().numpy())
        if self._sessions.precision != "float32":
            found = [to_bfloat16(kv).view(np.int16) for kv in found]  # torch indexes int16 and hardly uint16
        key, value = (torch.from_numpy(kv) for kv in found)
        return key, value

    def _head(self, h_RD: Tensor) -> Tensor:
        return torch.from_numpy(self._sessions.head(h_RD.contiguous().numpy())[0])

    def _best(self, h_RD: Tensor, index: Index, position: Position) -> list[int]:
        """Return the best tokens without all logits."""
        row_R = torch.tensor(self._rows(index))

        def process(asked: np.ndarray, scores_RV: np.ndarray) -> np.ndarray:
            of = torch.from_numpy(asked)
            at = position if isinstance(position, int) else position[of]
            return self._process(torch.from_numpy(scores_RV), row_R[of], at).numpy()

        h_RD = self._decoder.norm(h_RD)
        return self._sessions.best(h_RD.contiguous().numpy(), process if self._processors else None).tolist()


def _pairs(pending: Sequence[Block]) -> tuple[np.ndarray, np.ndarray]:
    """Return row and position, int64 ``[N]``, of all that is pending; the positions of a row lie together."""
    rows = [row for first, last, group in pending for row in group for _ in range(first, last)]
    positions = [position for first, last, group in pending for _ in group for position in range(first, last)]
    return np.array(rows), np.array(positions)
