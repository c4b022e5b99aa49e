"""What is drawn for a training step: which streams are left where, and which positions of the decoder."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_mue.training.supervision import Supervision


@dataclass(frozen=True)
class Step:
    """What was drawn for a step.

    Args:
        depths: streams before the decoder left early, and where; streams not named run at full depth.
        own_path: the decoder's gates learn along the model's own output.
        token_seed: draws a depth for every target position; None supervises every exit at every position.
    """

    depths: Mapping[str, int] = field(default_factory=dict)
    own_path: bool = False
    token_seed: int | None = None


def sample_step(how: Supervision, exits: Mapping[str, tuple[int, ...]], step: int, progress: float) -> Step:
    """Draw a step from (seed, step) alone, so that all ranks draw the same.

    Args:
        how: the settings.
        exits: stream name -> exit layers.
        step: of the run.
        progress: share of the training that is done.
    """
    if progress < how.early_after:
        return Step()
    own, copies = (random.Random(f"{how.seed}-{step}-{name}") for name in ("own_path", "propagate"))
    return Step(
        sample_depths(exits, how.early_probability, how.seed, step),
        own.random() < how.own_path,
        copies.getrandbits(63) if copies.random() < how.propagate else None,
    )


def sample_depths(exits: Mapping[str, tuple[int, ...]], probability: float, seed: int, step: int) -> dict[str, int]:
    """Draw the streams left early in a step, and where; streams not named run at full depth.

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


def sample_token_depths(layers: Sequence[int], shape: Sequence[int], seed: int) -> Tensor:
    """Draw one of ``layers`` for every target position, all alike likely: int64 ``[B, T]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor(layers)[torch.randint(len(layers), tuple(shape), generator=generator)]
