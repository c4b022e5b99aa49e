"""Retrieval against torchmetrics' own hit rates, query by query."""

import pytest
import torch
from torch.nn.functional import normalize
from torchmetrics.functional.retrieval import retrieval_hit_rate

from lightning_mue.metrics.retrieval import RANKS, Retrieval

N = 30


def pairs():
    g = torch.Generator().manual_seed(0)
    image = normalize(torch.randn(N, 6, generator=g), dim=-1)
    text = normalize(image + 0.8 * torch.randn(N, 6, generator=g), dim=-1)
    return image, text, torch.arange(N) % 23  # some texts are the same


@pytest.mark.parametrize("parts", [1, 4])
def test_it_is_torchmetrics(parts):
    image, text, number = pairs()
    metric = Retrieval()
    for rows in torch.arange(N).chunk(parts):
        metric.update(image[rows], text[rows], number[rows])
    found = metric.compute()
    same, scores = number[:, None] == number[None], image @ text.T
    for k in RANKS:
        to_text = [retrieval_hit_rate(scores[i], same[i], top_k=k) for i in range(N)]
        to_image = [retrieval_hit_rate(scores[:, i], same[:, i], top_k=k) for i in range(N)]
        assert found[f"image_to_text_R@{k}"] == pytest.approx(torch.stack(to_text).mean().item())
        assert found[f"text_to_image_R@{k}"] == pytest.approx(torch.stack(to_image).mean().item())
    assert 0.1 < found["image_to_text_R@1"] < found["image_to_text_R@10"]


def test_fewer_pairs_than_ranks():
    image, text, number = (part[:3] for part in pairs())
    metric = Retrieval()
    metric.update(image, text, number)
    assert metric.compute()["text_to_image_R@10"] == 1
