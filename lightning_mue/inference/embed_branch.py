"""A tower that ends in embeddings: one vector for each row that leaves, and the signals that are read off it.

Shapes: ``B`` rows of a stream, ``R`` those that leave, ``T`` tokens, ``D`` width, ``E`` width of embeddings, ``C``
classes.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lightning_mue.backbones import EncoderStream, StreamState
from lightning_mue.exits import Exits
from lightning_mue.inference.encode import stream_scores
from lightning_mue.inference.record import STREAM_SIGNALS
from lightning_mue.policy import OF_EMBEDDINGS
from lightning_mue.signals import margin, pooled_similarity


class EmbedBranch:
    """Leaving gives unit vectors ``[R, E]``: the adapter, then what the model makes of a tower's last states.

    A signal of embeddings is read off the very vectors that leaving returns, so these are made once.

    Args:
        stream: the tower's.
        reads: name of its input.
        exits: the backbone's, or None.
        pool: states -> unit vectors.
        class_logits: vectors ``[B, E]`` -> logits of classes ``[B, C]``; only ``class_margin`` asks.
    """

    def __init__(
        self,
        stream: EncoderStream,
        reads: str,
        exits: Exits | None,
        pool: Callable[[StreamState], Tensor],
        class_logits: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.stream, self.exits, self.pool = stream, exits, pool
        self._reads, self._class_logits = reads, class_logits
        self._made: tuple[Tensor, Tensor] | None = None
        """States, and the vectors made of them for a signal."""

    def start(self, given: Tensor) -> StreamState:
        """Return the states that enter layer 1."""
        return self.stream.prologue({self._reads: given}, {})

    def attached(self) -> Exits:
        """Return the exits, some of which are this tower's.

        Raises:
            ValueError: it has none.
        """
        name = self.stream.name
        if self.exits is None or not self.exits.layers.get(name):
            raise ValueError(
                f"There are no exits of {name!r} to calibrate; attach some, such as {name}=[1, 2], and train."
            )
        return self.exits

    @property
    def signals(self) -> list[str]:
        """The signals that can be asked: gates where they are, margins where there are classes."""
        plain = [signal for signal in STREAM_SIGNALS if signal != "gate" or self.attached().config.gate]
        return [*plain, "pooled_similarity", *(["class_margin"] if self._class_logits is not None else [])]

    def scores(self, signal: str, k: int, state: StreamState, before_BTD: Tensor) -> Tensor:
        """Return the exit scores ``[B]`` after layer ``k``."""
        if signal not in OF_EMBEDDINGS:
            return stream_scores(self.exits, signal, self.stream.name, k, state, before_BTD)
        vectors_BE = self._embed(k, state)
        self._made = (state.h_BTD, vectors_BE)
        if signal == "pooled_similarity":  # both through this exit's branch: what differs is the layer's doing
            return pooled_similarity(vectors_BE, self._embed(k, state.at(before_BTD)))
        assert self._class_logits is not None
        return margin(self._class_logits(vectors_BE))

    def left(self, k: int, state: StreamState, leaves_B: Tensor | None = None) -> Tensor:
        """Return the vectors of rows that leave after layer ``k``."""
        if self._made is not None and self._made[0] is state.h_BTD:
            return self._made[1] if leaves_B is None else self._made[1][leaves_B]
        return self._embed(k, state if leaves_B is None else state.rows(leaves_B))

    def _embed(self, k: int, state: StreamState) -> Tensor:
        h_BTD = state.h_BTD
        return self.pool(state if self.exits is None else state.at(self.exits.adapt(self.stream.name, k, h_BTD)))
