"""Outside: what of a decoder lies outside its layers and its head, for an executor of arrays. No torch here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from lightning_mue.inference.array_signals import log_odds_of_two, sigmoid
from lightning_mue.inference.session import DecoderSessions, Head, Session

Array = np.ndarray


class Outside(ABC):
    """Embedding, exit branches and gates.

    Args:
        sessions: the decoder's.
        shortlist: tokens over which gates see how sure an exit is, or None.
    """

    def __init__(self, sessions: DecoderSessions, shortlist: Sequence[int] | None) -> None:
        self._sessions, self._shortlist = sessions, shortlist

    @abstractmethod
    def embed(self, ids_Rm: Array, first: int) -> Array:
        """Return the states ``[R, m, D]`` that enter layer 1 for tokens at positions ``first, first + 1, ...``."""

    @abstractmethod
    def branch(self, layer: int, h_RD: Array) -> Array:
        """Return what the head reads of an exit's states: adapter and final norm applied."""

    @abstractmethod
    def gate_session(self, layer: int) -> Session:
        """Return an exit's gate: states, and what it sees beside them -> logits."""

    def gate(self, layer: int, h_RD: Array) -> Array:
        """Return an exit's gate scores ``[R]``."""
        if self._shortlist_head is None:
            return sigmoid(self.gate_session(layer)(h_RD)[0])
        sure_R2 = log_odds_of_two(self._shortlist_head(self.branch(layer, h_RD)))
        return sigmoid(self.gate_session(layer)(h_RD, sure_R2)[0])

    @cached_property
    def _shortlist_head(self) -> Head | None:
        """Return what maps normed states to the shortlist's logits."""
        if self._shortlist is None:
            return None
        shortlist, bias = list(self._shortlist), self._sessions.bias_V
        weight_DS = np.ascontiguousarray(self._sessions.weight_VD[shortlist].T)
        bias_S = np.zeros(len(shortlist), np.float32) if bias is None else bias[shortlist]
        return lambda h_RD: h_RD @ weight_DS + bias_S
