"""Exit gates: the cheap learned signal."""

from __future__ import annotations

from torch import Tensor, nn


class ExitGate(nn.Module):
    """A tiny MLP on the state that says "leaving here is safe".

    In the decoder: "the last layer would choose the same token". In a stream left once per sample: "the output would
    not change", read from the mean state over the sample's own tokens.

    Args:
        width: of the states.
        hidden: hidden units.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, 1))

    def forward(self, h: Tensor) -> Tensor:
        """Return the logit of "safe", ``[...]``, for states ``[..., D]``."""
        return self.mlp(h).squeeze(-1)


def pool(h_BTD: Tensor, valid_BT: Tensor | None) -> Tensor:
    """Return the mean state over each sample's valid tokens, ``[B, D]``."""
    if valid_BT is None:
        return h_BTD.mean(1)
    weight_BT1 = valid_BT.to(h_BTD.dtype).unsqueeze(-1)
    return (h_BTD * weight_BT1).sum(1) / weight_BT1.sum(1).clamp(min=1)
