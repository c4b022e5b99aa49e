"""Rotary positions (Su et al., arXiv 2104.09864) of models of transformers that keep a rotation per kind of layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Turns(nn.Module):
    """Positions -> cosines and sines.

    For graphs, which are exported once for many layers and must be given each one's frequencies: transformers' own
    module keeps them out of its ``state_dict``. (ONNX Runtime takes 16 cosines at a time, and what is left over in
    another way: where heads are no multiple of 16, the last bit depends on how many positions there are.)

    Args:
        rotary: transformers' module.
        kind: of layer.
    """

    def __init__(self, rotary: Any, kind: str) -> None:
        super().__init__()
        self.inv_freq = nn.Buffer(getattr(rotary, f"{kind}_inv_freq"))
        self.scale: float = getattr(rotary, f"{kind}_attention_scaling")

    def forward(self, at: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return both, ``[..., d]``, for positions ``[..., 1]``, in the type of ``like``."""
        angle = (at.float() * self.inv_freq.float()).tile(2)
        return (angle.cos() * self.scale).to(like.dtype), (angle.sin() * self.scale).to(like.dtype)


def check_turns(rotary: Any) -> None:
    """Refuse rotations that are not of the position alone, for K of earlier positions are kept.

    Raises:
        ValueError: of which layers.
    """
    for kind, found in rotary.rope_type.items():
        if "dynamic" in found or found == "longrope":
            raise ValueError(
                f"`rope_parameters[{kind!r}]` are of type {found!r}, which turns earlier positions anew as answers "
                "grow; exits need one that does not: 'default', 'linear', 'yarn' or 'llama3'."
            )
