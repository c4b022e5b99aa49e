from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import lightning_mue as mue
from lightning_mue.backbones.processor import build_processor
from lightning_mue.data.tokenizer import train_tokenizer
from lightning_mue.exits import attach_exits
from lightning_mue.policy import ExitPolicy, ExitRule
from tests import zoo

SHORTLIST = {"florence2_prenorm": 16}
"""Backbones whose gates see how sure an exit is."""


@dataclass
class Frozen:
    """A model, and the bundle of graphs made of it."""

    name: str
    model: Any
    folder: Path
    processor: Any

    @cached_property
    def engine(self):
        """Of the bundle, loaded once; a test gives it the policy that it is about."""
        return mue.load(self.folder)


def make_frozen(name, folder, precision=None):
    """The model's words are the processor's. Its policy asks for logits, so that its head is written too."""
    words = train_tokenizer(["what is this?", "a red square left of it"], 300)
    processor = build_processor(words, 64, zoo.image_tokens(name))
    torch.manual_seed(0)
    with mock.patch.object(zoo, "VOCABULARY", len(processor.tokenizer)):
        model = zoo.BACKBONES[name][0]().requires_grad_(False).eval()
    exits = attach_exits(model, replace(zoo.exit_config(name), shortlist=SHORTLIST.get(name, 0)))
    for parameter in exits.parameters():
        parameter.requires_grad_(False).add_(torch.randn_like(parameter) * 0.2)
    if exits.shortlist is not None:
        exits.set_shortlist(torch.rand(len(processor.tokenizer)))
    first = zoo.exit_layers(name)["decoder"][:1]
    policy = ExitPolicy({"decoder": ExitRule("confidence", first, (0.99,))}, precision=precision)
    return Frozen(name, model, mue.freeze(model, policy, folder, processor, runtime="onnxruntime"), processor)


OF_PICTURES = [name for name in zoo.BACKBONES if name not in ("t5", "udop")]
"""Backbones that read what a processor of pictures and prompts gives."""


@pytest.fixture(scope="session", params=OF_PICTURES)
def frozen(request, tmp_path_factory):
    pytest.importorskip("onnxscript")
    return make_frozen(request.param, tmp_path_factory.mktemp("graphs") / request.param)
