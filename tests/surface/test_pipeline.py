"""transformers' `image-text-to-text` pipeline around a model whose exits are enabled."""

from unittest import mock

import pytest
import torch
from PIL import Image
from transformers import pipeline

import lightning_mue as mue
from lightning_mue.backbones.processor import build_processor
from lightning_mue.data.tokenizer import train_tokenizer
from lightning_mue.policy import ExitPolicy, ExitRule
from tests import zoo

PROMPTS = ["what is this ?", "a red square left of it", "left", "what is left of the square ?"]
PICTURES = [Image.effect_noise((40 + 8 * i, 64), 90).convert("RGB") for i in range(len(PROMPTS))]
STEPS = 6
HOWS = [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 20}]


@pytest.fixture(scope="module")
def pipe():
    """Of a tiny model whose words are those of its processor, as a user has it of a pretrained one."""
    processor = build_processor(train_tokenizer(PROMPTS, 300), 64, zoo.image_tokens("florence2"))
    with mock.patch.object(zoo, "VOCABULARY", len(processor.tokenizer)):
        model = zoo.make("florence2")
    return pipeline("image-text-to-text", model=model, processor=processor.processor)


@pytest.fixture
def ask(pipe):
    """Return each answer's tokens, and its text."""

    def said(**how):
        torch.manual_seed(5)
        settings = {"max_new_tokens": STEPS} | how.pop("generate", {})
        return pipe(images=PICTURES, text=PROMPTS, generate_kwargs=settings, **how)

    def ask(**generate):
        tokens = [one["generated_token_ids"].tolist() for one in said(generate=generate, return_tensors=True)]
        return tokens, [one["generated_text"] for one in said(generate=generate)]

    yield ask
    mue.disable(pipe.model)


@pytest.mark.parametrize("how", HOWS, ids=lambda how: " ".join(how) or "greedy")
def test_at_full_depth_it_says_what_it_said(pipe, ask, how):
    before = ask(**how)
    assert len(set(map(str, before[0]))) > 1
    found = mue.enable(pipe.model, ExitPolicy.full_depth())
    assert ask(**how) == before
    assert (found.exit_depths["vision"] == 4).all()


def test_under_a_policy_it_leaves_early_and_disabled_it_is_as_before(pipe, ask):
    before = ask()
    policy = ExitPolicy(
        {"vision": ExitRule.static(2), "encoder": ExitRule.static(2), "decoder": ExitRule("gate", [1, 2], [0.4, 0.4])}
    )
    found = mue.enable(pipe.model, policy)
    early = ask()
    assert early != before
    assert all((found.exit_depths[stream] == 2).all() for stream in ("vision", "encoder"))
    assert (found.exit_depths["decoder"] < 5).any()
    tensors = pipe.processor(images=PICTURES, text=PROMPTS, return_tensors="pt", padding=True)
    engine = mue.ExitEngine(pipe.model, policy)
    assert early[0] == engine.generate(STEPS, **tensors).sequences.tolist()
    mue.disable(pipe.model)
    assert ask() == before
