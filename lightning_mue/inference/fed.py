"""A decode whose tokens are chosen elsewhere: it is fed tokens, and says where each row left."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_mue.inference.schedule import DecoderExits, Place
from lightning_mue.inference.sharing import SharingDecoding, SharingExecutor


class FedDecoding(SharingDecoding):
    """One decode under way, all rows at one position; `feed` is its step.

    Args:
        executor: what computes.
        exits: when to leave; no drafts, no forced depths.
        prompts: row -> tokens that are given, equally many.
        steps: answer tokens at most.
    """

    def __init__(
        self, executor: SharingExecutor, exits: DecoderExits, prompts: Sequence[Sequence[int]], steps: int
    ) -> None:
        super().__init__(executor, exits, prompts, (), steps)
        self._rows, self.length = list(range(len(prompts))), 0

    def feed(self, tokens: Sequence[Sequence[int]]) -> dict[int, list[Place]]:
        """Take each row's new tokens, the whole prompt first; return exit layer -> places that choose what follows."""
        if self.length:
            for row, new in zip(self._rows, tokens, strict=True):
                self.record.tokens[row].extend(new)
        self.executor.embed(self._rows, self.length, tokens)
        self.length += len(tokens[0])
        self.at = [self.length - 1] * len(self._rows)
        left = self._climb(self._rows)
        for layer, group in left.items():
            for row in group:
                self.record.depths[row].append(layer)
        return {layer: [(row, self.at[row]) for row in group] for layer, group in left.items()}

    def follow(self, parents: Sequence[int]) -> None:
        """Let every row go on from another."""
        self._follow(self._rows, parents)
        of = self.record
        of.tokens, of.depths = [list(of.tokens[p]) for p in parents], [list(of.depths[p]) for p in parents]
