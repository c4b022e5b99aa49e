"""The arithmetic of the losses."""

import math

import pytest
import torch
from torch.nn.functional import binary_cross_entropy

from lightning_mue.training import Supervision
from lightning_mue.training.losses import divergence, exit_weights, gate_loss


def test_weights_are_those_of_the_papers():
    assert exit_weights("avg+last", (1, 2, 4)) == pytest.approx((1 / 3, 1 / 3, 4 / 3))
    assert exit_weights("sum", (1, 2, 4)) == (1, 1, 1)
    assert exit_weights("linear", (1, 2, 4)) == pytest.approx((1 / 7, 2 / 7, 4 / 7))
    with pytest.raises(ValueError, match=r"avg\+last, sum or linear, got 'mean'"):
        exit_weights("mean", (1, 2))


def test_divergence_of_two_coins():
    """KL(fair || biased), worked out by hand; a temperature of 2 takes square roots of the odds."""
    logits = torch.tensor([[math.log(0.9), math.log(0.1)]])
    fair = torch.tensor([[math.log(0.5), math.log(0.5)]])
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert divergence(logits, fair, 1.0).item() == pytest.approx(expected, rel=1e-5)
    p = 3 / 4  # odds 9 : 1 become 3 : 1
    expected = 4 * (0.5 * math.log(0.5 / p) + 0.5 * math.log(0.5 / (1 - p)))
    assert divergence(logits, fair, 2.0).item() == pytest.approx(expected, rel=1e-5)
    assert divergence(fair, fair, 2.0).item() == pytest.approx(0.0, abs=1e-7)


def test_gate_loss_balances_classes():
    logits = torch.zeros(100)
    safe = torch.zeros(100, dtype=torch.bool)
    safe[:90] = True
    # Gradients of the safe and the unsafe must weigh the same at logit 0.
    logits.requires_grad_()
    gate_loss(logits, safe).backward()
    assert logits.grad[:90].sum().item() == pytest.approx(-logits.grad[90:].sum().item(), rel=1e-5)


def test_gate_loss_without_balance_is_the_plain_mean():
    logits, safe = torch.randn(50, generator=torch.Generator().manual_seed(0)), torch.arange(50) < 45
    torch.testing.assert_close(gate_loss(logits, safe, False), binary_cross_entropy(logits.sigmoid(), safe.float()))
    assert gate_loss(logits, safe, False) != gate_loss(logits, safe)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"propagate": 1.5}, r"`propagate` must be a share in \[0, 1\], got 1.5"),
        ({"own_path": -0.1}, r"`own_path` must be a share in \[0, 1\], got -0.1"),
        ({"early_after": 2.0}, r"`early_after` must be a share in \[0, 1\], got 2.0"),
        ({"distill": -1.0}, "`distill` must be a weight of 0 or more, got -1.0"),
        ({"gate_weight": math.nan}, "`gate_weight` must be a weight of 0 or more, got nan"),
        ({"distill_temperature": 0.0}, "`distill_temperature` must be above 0, got 0.0"),
        ({"weighting": "mean"}, r"avg\+last, sum or linear, got 'mean'"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        Supervision(**settings)
