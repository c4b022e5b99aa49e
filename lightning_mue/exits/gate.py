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
        beside: numbers that the gate sees beside the state.
    """

    def __init__(self, width: int, hidden: int, beside: int = 0) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, 1))
        self.beside = nn.Linear(beside, hidden, bias=False) if beside else None

    def forward(self, h: Tensor, beside: Tensor | None = None) -> Tensor:
        """Return the logit of "safe", ``[...]``, for states ``[..., D]`` and what the gate sees beside them."""
        if self.beside is None:
            return self.mlp(h).squeeze(-1)
        assert beside is not None
        norm, down, gelu, up = self.mlp
        return up(gelu(down(norm(h)) + self.beside(beside.to(h.dtype)))).squeeze(-1)


def top_two(logits: Tensor) -> Tensor:
    """Return the log-odds of the two highest probabilities, ``[..., 2]``, from logits ``[..., S]``.

    Odds and not probabilities: most exits are nearly sure, and a gate must see how nearly. Ends at +-13.8 (1e-6).
    """
    return logits.float().softmax(-1).topk(2, dim=-1).values.logit(eps=1e-6)


def pool(h_BTD: Tensor, valid_BT: Tensor | None) -> Tensor:
    """Return the mean state over each sample's valid tokens, ``[B, D]``."""
    if valid_BT is None:
        return h_BTD.mean(1)
    weight_BT1 = valid_BT.to(h_BTD.dtype).unsqueeze(-1)
    return (h_BTD * weight_BT1).sum(1) / weight_BT1.sum(1).clamp(min=1)
