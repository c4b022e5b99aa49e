"""Scored: the logits that exits' signals computed in one step. No torch here; tensors and arrays alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_mue.inference.schedule import Place


class Scored:
    """What exits of a step have said: whoever leaves there need not ask the head again."""

    def __init__(self) -> None:
        self._logits: dict[int, tuple[Sequence[Place], Any]] = {}
        self._streaks: dict[int, tuple[int, int]] = {}

    def clear(self) -> None:
        """Begin a step."""
        self._logits.clear()
        self._streaks.clear()

    def note(self, layer: int, places: Sequence[Place], logits_RV: Any) -> None:
        """Keep an exit's processed logits."""
        self._logits[layer] = (places, logits_RV)

    def patience(self, layer: int) -> list[float]:
        """Return how many exits in a row, this one included, have chosen the same token in this step (PABEE)."""
        places, logits_RV = self._logits[layer]
        for (row, _), token in zip(places, logits_RV.argmax(-1).tolist(), strict=True):
            before, count = self._streaks.get(row, (token, 0))
            self._streaks[row] = (token, count + 1 if token == before else 1)
        return [float(self._streaks[row][1]) for row, _ in places]

    def split(self, exits: Mapping[int, Sequence[Place]]) -> tuple[dict[Place, int], dict[int, Sequence[Place]]]:
        """Return the tokens that are known, and the places by layer whose logits nobody has."""
        known: dict[Place, int] = {}
        for layer in exits.keys() & self._logits.keys():
            order, logits_RV = self._logits[layer]
            tokens_of = dict(zip(order, logits_RV.argmax(-1).tolist(), strict=True))
            known |= {place: tokens_of[place] for place in exits[layer]}
        return known, {layer: places for layer, places in exits.items() if layer not in self._logits}
