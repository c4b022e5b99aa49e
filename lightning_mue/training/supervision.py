"""How exits are trained: plain settings, checked once."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_mue.training.losses import Weighting, exit_weights


@dataclass(frozen=True)
class Supervision:
    """The settings of the objective.

    Args:
        weighting: of the decoder exits' losses: ``avg+last`` (DEED), ``sum`` (MuE), ``linear`` (CALM).
        early_probability: that a stream before the decoder is left at a random exit in a step.
        early_after: share of the training after which ``early_probability``, ``own_path`` and ``propagate`` begin.
        gate_weight: weight of the gates' loss; their inputs are detached, so they cost the backbone nothing.
        gate_balance: safe and unsafe states weigh the same in the gates' loss; else as often as they occur, which makes
            a gate's score the probability of agreement.
        own_path: share of steps in which the decoder's gates learn along the model's own greedy output, as they will
            be asked at inference, instead of the references. Such a step decodes.
        distill: weight of the KL divergence from the last exit's distribution (no gradient) to each earlier decoder
            exit's, mean over exits.
        distill_temperature: of both distributions.
        caption: weight of the decoder's cross-entropy.
        contrast: weight of the contrastive loss, for backbones that compare pictures with texts (CoCa's own is half of
            captioning's); in every step but those of ``propagate``.
        propagate: share of steps in which every target position leaves the decoder at a random exit and deeper layers
            project their K/V from the state it left with, as under K/V fill ``propagate`` (CALM); such a step replaces
            deep supervision and distillation, in expectation with the same ``weighting``.
        seed: of all that is drawn.
    """

    weighting: Weighting = "avg+last"
    early_probability: float = 0.25
    early_after: float = 0.3
    gate_weight: float = 1.0
    gate_balance: bool = True
    own_path: float = 0.0
    distill: float = 0.0
    distill_temperature: float = 1.0
    caption: float = 1.0
    contrast: float = 0.0
    propagate: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        exit_weights(self.weighting, (1,))  # refuses an unknown one
        for name in ("early_probability", "early_after", "own_path", "propagate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be a share in [0, 1], got {getattr(self, name)}")
        for name in ("gate_weight", "distill", "caption", "contrast"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` must be a weight of 0 or more, got {getattr(self, name)}")
        if not self.distill_temperature > 0:
            raise ValueError(f"`distill_temperature` must be above 0, got {self.distill_temperature}")

    @property
    def begins_late(self) -> bool:
        """Whether anything depends on how far the training is."""
        return self.early_after > 0 and max(self.early_probability, self.own_path, self.propagate) > 0
