"""Which depth each stream is left at in a training step."""

from __future__ import annotations

import random
from collections.abc import Mapping


def sample_depths(exits: Mapping[str, tuple[int, ...]], probability: float, seed: int, step: int) -> dict[str, int]:
    """Draw the streams left early in a step, and where; streams not named run at full depth.

    Drawn from (seed, step) alone, so that all ranks draw the same.

    Args:
        exits: stream name -> exit layers (the decoder, whose exits are all supervised in every step, is left out).
        probability: that a stream is left early in a step.
        seed: of the run.
        step: of the run.
    """
    rng = random.Random(f"{seed}-{step}")
    depths = {}
    for stream, layers in sorted(exits.items()):
        leaves, depth = rng.random() < probability, rng.choice(layers)
        if stream != "decoder" and leaves:
            depths[stream] = depth
    return depths
