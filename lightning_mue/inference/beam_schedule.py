"""The schedule of a decode with beams: rows that share positions. Row ``s * K + b`` is beam ``b`` of sample ``s``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from lightning_mue.inference.beams import BeamSearch, BeamSettings
from lightning_mue.inference.schedule import DecodeRecord, DecoderExits, Place
from lightning_mue.inference.sharing import SharingDecoding, SharingExecutor


class BeamExecutor(SharingExecutor, Protocol):
    """Runs layers for beams."""

    def log_probs(self, exits: Mapping[int, Sequence[Place]]) -> np.ndarray:
        """Return the processed log probabilities ``[R, V]``, float32, of each place in turn, given by exit layer."""


def decode_beams(
    executor: BeamExecutor,
    exits: DecoderExits,
    prompts: Sequence[Sequence[int]],
    end_ids: Sequence[int],
    steps: int,
    settings: BeamSettings,
) -> DecodeRecord:
    """Decode by beam search; every beam leaves each step at its own layer. Arguments as of `decode`.

    Returns:
        The best hypothesis of each sample.

    Raises:
        ValueError: K/V are made up, depths forced or drafts verified, which is of greedy decoding.
    """
    if exits.kv_fill != "just-in-time" or exits.forced is not None or exits.drafting is not None:
        raise ValueError("Beams go with just-in-time K/V alone, without forced depths or drafts; take `num_beams=1`")
    return _BeamDecoding(executor, exits, prompts, end_ids, steps, settings).run()


class _BeamDecoding(SharingDecoding):
    """One decode under way."""

    executor: BeamExecutor

    def __init__(
        self,
        executor: BeamExecutor,
        exits: DecoderExits,
        prompts: Sequence[Sequence[int]],
        end_ids: Sequence[int],
        steps: int,
        settings: BeamSettings,
    ) -> None:
        self.beams = settings.num_beams
        super().__init__(executor, exits, [p for p in prompts for _ in range(self.beams)], end_ids, steps)
        self.searches = [BeamSearch(settings, end_ids, steps) for _ in prompts]

    def run(self) -> DecodeRecord:
        """Decode; the record is then of samples instead of rows."""
        record = super().run()
        best = [search.finished[0] for search in self.searches]
        record.tokens, record.depths = [found.tokens for found in best], [found.depths for found in best]
        return record

    def _begin(self) -> list[int]:
        return list(range(0, len(self.prompts), self.beams))  # until they differ, the first beam stands for all

    def _going(self, live: list[int]) -> list[int]:
        samples = dict.fromkeys(row // self.beams for row in live)
        going = [s for s in samples if not self.searches[s].done]
        started = {s: range(self.beams if self.searches[s].running[0].tokens else 1) for s in going}
        return [s * self.beams + beam for s, beams in started.items() for beam in beams]

    def _choose(self, rows: list[int]) -> None:
        if not rows:
            return
        left = self._climb(rows)
        places = {layer: [(r, self.at[r]) for r in group] for layer, group in left.items()}
        found_RV = self.executor.log_probs(places)
        order = {row: i for i, row in enumerate(row for group in left.values() for row in group)}
        depth = {row: layer for layer, group in left.items() for row in group}
        for sample in dict.fromkeys(row // self.beams for row in rows):
            of_sample = range(sample * self.beams, (sample + 1) * self.beams)
            source = [row if row in order else of_sample[0] for row in of_sample]
            search = self.searches[sample]
            parents = search.advance(found_RV[[order[row] for row in source]], [depth[row] for row in source])
            if not search.done:
                self._follow(of_sample, [source[parent] for parent in parents])
                for row, beam in zip(of_sample, search.running, strict=True):
                    self.record.tokens[row], self.record.depths[row] = beam.tokens, beam.depths
