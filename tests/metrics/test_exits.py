import random

import pytest
import torch
from torchmetrics import MetricCollection

from lightning_mue.metrics import ExitAgreement, MeanExitDepth

pytestmark = pytest.mark.filterwarnings("ignore:The ``compute`` method")

PAD = 1


def test_depths_of_each_stream():
    depths = MetricCollection({f"depth_{s}": MeanExitDepth(s) for s in ("vision", "decoder")})
    # In the first batch both streams have the same depths; they must not be taken for one metric.
    depths.update({"vision": torch.tensor([2, 4]), "decoder": torch.tensor([[2], [4]]), "encoder": torch.tensor([9])})
    depths.update({"vision": torch.tensor([3]), "decoder": torch.tensor([[1, 6, 6, 0, 0]])})
    found = depths.compute()
    assert found["depth_vision"].item() == 3
    assert found["depth_decoder"].item() == (2 + 4 + 1 + 6 + 6) / 5
    assert found["depth_decoder"].dtype == torch.float64


def test_depths_are_added_without_loss():
    metric = MeanExitDepth("decoder")
    metric.update({"decoder": torch.tensor([2**24, 1], dtype=torch.int32)})
    for _ in range(3):
        metric.update({"decoder": torch.ones(1, dtype=torch.int32)})  # float32 would lose each 1
    assert metric.compute().item() == (2**24 + 4) / 5


def test_no_depths():
    assert MeanExitDepth("vision").compute().isnan()
    with pytest.raises(ValueError, match=r"must hold stream 'vision', got \['decoder'\]"):
        MeanExitDepth("vision").update({"decoder": torch.ones(1)})


def test_agreement():
    full = torch.tensor([[0, 5, 6, 2], [0, 7, 2, PAD], [0, 8, 8, 2], [0, 2, PAD, PAD]])
    early = torch.tensor([[0, 5, 6, 2, PAD], [0, 7, 7, 7, 2], [0, 8, 2, PAD, PAD], [0, 2, PAD, PAD, PAD]])
    both = MetricCollection({u: ExitAgreement(u, PAD) for u in ("token", "output")})
    both.update(early, full)
    # By row: 3 of 3; 1 of 4 (one output is longer); 1 of 3; 1 of 1.
    assert both.compute()["token"].item() == 6 / 11
    assert both.compute()["output"].item() == 2 / 4
    both.update(full, full)
    assert both.compute()["token"].item() == (6 + 9) / (11 + 9)
    assert both.compute()["output"].item() == 6 / 8


def padded(rows):
    width = 1 + max(map(len, rows))
    return torch.tensor([[0, *row] + [PAD] * (width - 1 - len(row)) for row in rows])


def test_agreement_equals_counting_by_hand_and_is_blind_to_padding():
    draw = random.Random(0)
    for _ in range(50):
        ours, full = ([[draw.randint(2, 4) for _ in range(draw.randint(1, 4))] for _ in range(6)] for _ in range(2))
        equal = sum(a == b for x, y in zip(ours, full, strict=True) for a, b in zip(x, y, strict=False))
        tokens = sum(max(len(x), len(y)) for x, y in zip(ours, full, strict=True))
        wider = torch.cat([padded(ours), torch.full((6, 3), PAD)], 1)
        for pair in ((padded(ours), padded(full)), (padded(full), padded(ours)), (wider, padded(full))):
            token, output = ExitAgreement("token", PAD), ExitAgreement("output", PAD)
            token.update(*pair)
            output.update(*pair)
            assert token.compute().item() == equal / tokens
            assert output.compute().item() == sum(x == y for x, y in zip(ours, full, strict=True)) / 6


def test_agreement_errors():
    with pytest.raises(ValueError, match="`unit` must be 'token' or 'output', got 'row'"):
        ExitAgreement("row", PAD)
    with pytest.raises(ValueError, match="2 sequences with exits and 3"):
        ExitAgreement("token", PAD).update(torch.zeros(2, 3), torch.zeros(3, 3))
    assert ExitAgreement("token", PAD).compute().isnan()
