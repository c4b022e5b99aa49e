"""Invariant 8: a bundle reloads to the same tokens and exit depths."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import lightning_mue
from lightning_mue.backbones import fingerprint
from lightning_mue.export import freeze, load
from lightning_mue.inference import ExitEngine
from lightning_mue.policy import ExitPolicy
from tests import zoo
from tests.export.conftest import mixed_policy
from tests.promises import certificate

BACKBONES = list(zoo.BACKBONES)


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("kind", ["full depth", "mixed"])
def test_same_tokens_and_depths(name, kind, tmp_path):
    model = zoo.make(name)
    policy = ExitPolicy.full_depth() if kind == "full depth" else mixed_policy(name)
    batch = zoo.inputs(name, 5)
    expected = ExitEngine(model, policy).generate(**batch)
    engine = load(freeze(model, policy, tmp_path / "bundle"))
    found = engine.generate(**batch)
    assert found.sequences.tolist() == expected.sequences.tolist()
    for stream, depths in expected.exit_depths.items():
        assert found.exit_depths[stream].tolist() == depths.tolist()
    if kind == "mixed":
        assert any(len(set(depths.flatten().tolist()) - {0}) > 1 for depths in expected.exit_depths.values())
    assert engine.policy.fingerprint == fingerprint(model) == fingerprint(engine.model)
    assert not engine.model.training


@pytest.mark.parametrize("name", BACKBONES)
def test_without_exits_and_in_bfloat16(name, tmp_path):
    model = zoo.make(name, exits=False).to(torch.bfloat16)
    engine = load(freeze(model, ExitPolicy.full_depth(), tmp_path / "bundle"))
    assert engine.exits is None
    assert {p.dtype for p in engine.model.parameters()} == {torch.bfloat16}
    assert fingerprint(engine.model) == fingerprint(model)


def test_freezing_leaves_model_and_random_numbers_as_they_are(tmp_path):
    model = zoo.make("florence2").train()
    before, state = fingerprint(model), torch.get_rng_state()
    load(freeze(model, ExitPolicy.full_depth(), tmp_path / "bundle"))
    assert model.training
    assert fingerprint(model) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_same_inputs_give_the_same_bytes(bundle_once, tmp_path):
    again = freeze(zoo.make("florence2"), mixed_policy("florence2"), tmp_path / "bundle")
    names = sorted(path.name for path in bundle_once.iterdir())
    assert names == ["README.md", "config.json", "manifest.json", "model.safetensors", "policy.json"]
    for name in names:
        assert (again / name).read_bytes() == (bundle_once / name).read_bytes()


def test_tied_weights_are_stored_once_and_stay_tied(bundle_once):
    model = load(bundle_once).model
    assert model.lm_head.weight is model.get_input_embeddings().weight
    tied = {name for name, tensor in model.state_dict().items() if tensor.data_ptr() == model.lm_head.weight.data_ptr()}
    with safe_open(bundle_once / "model.safetensors", "pt") as file:
        stored = set(file.keys())
    assert len(tied) > 1
    assert len(tied & stored) == 1
    assert set(model.state_dict()) == stored | tied


def test_answers_as_text(talking_model, make_processor, tmp_path):
    pictures = [Image.fromarray(np.full((20, 30, 3), shade, np.uint8)) for shade in (10, 200)]
    prompts = ["what is this?", "a red"]
    expected = ExitEngine(talking_model, ExitPolicy.full_depth(), processor=make_processor())
    engine = load(freeze(talking_model, ExitPolicy.full_depth(), tmp_path / "b", processor=make_processor()))
    answers = engine.answer(pictures, prompts, max_new_tokens=4)
    assert answers == expected.answer(pictures, prompts, max_new_tokens=4)
    assert len(answers) == 2
    assert all(isinstance(text, str) for text in answers)
    given = engine.answer(pictures, prompts, 4, ["a red", ""])
    assert given[0] == engine.answer(pictures[:1], prompts[:1], 4, ["a red"])[0]
    assert given[1] == answers[1]
    assert engine.answer(pictures[::-1], prompts[::-1], 4, ["", "a red"]) == given[::-1]
    one = engine.processor(pictures[:1], prompts[:1])
    ids = torch.tensor([[2, *engine.processor.tokenizer("a red", add_special_tokens=False)["input_ids"]]])
    plain = engine.model.generate(**one, decoder_input_ids=ids, max_new_tokens=4, num_beams=1, do_sample=False)
    assert given[0] == engine.processor.decode(plain[:, ids.shape[1] :])[0]


def test_a_transformers_processor_will_do(talking_model, make_processor, tmp_path):
    folder = freeze(talking_model, ExitPolicy.full_depth(), tmp_path / "b", processor=make_processor().processor)
    assert load(folder).processor is not None


def test_answer_needs_a_processor_and_as_many_prompts(bundle_once, talking_model, make_processor):
    with pytest.raises(ValueError, match="needs a processor"):
        load(bundle_once).answer([], [])
    engine = ExitEngine(talking_model, ExitPolicy.full_depth(), processor=make_processor())
    with pytest.raises(ValueError, match="one text for each of 1 images, got 2"):
        engine.answer([Image.new("RGB", (8, 8))], ["a", "b"])
    with pytest.raises(ValueError, match=r"`prompts` must .*got one text"):
        engine.answer([Image.new("RGB", (8, 8))], "a")
    with pytest.raises(ValueError, match=r"`decoder_prompts` must .*got 2"):
        engine.answer([Image.new("RGB", (8, 8))], ["a"], decoder_prompts=["a", "b"])


def test_a_prompt_that_would_be_passed_over_is_refused(make_processor):
    engine = ExitEngine(zoo.make("coca"), ExitPolicy.full_depth(), processor=make_processor())
    with pytest.raises(ValueError, match=r"reads pictures alone .* got 'what is this\?'"):
        engine.answer([Image.new("RGB", (8, 8))] * 2, ["", "what is this?"])


def test_the_card_says_promise_policy_and_use(tmp_path):
    promised = certificate()
    policy = ExitPolicy(mixed_policy("florence2").rules, certificate=promised)
    folder = freeze(zoo.make("florence2"), policy, tmp_path / "captioner", table="| a |\n| --- |\n| 7 |")
    card = (folder / "README.md").read_text()
    assert promised.in_words() in card
    assert "| 7 |" in card
    assert re.search(r"\| decoder \| gate \| 1: 0.5, 2: 0.5", card)
    assert 'mue.load("captioner")' in card


def test_a_loaded_bundle_answers_without_lightning(bundle_once):
    """In a process of its own: what this one has imported says nothing."""
    script = (
        "import sys, lightning_mue\n"
        f"engine = lightning_mue.load({str(bundle_once)!r})\n"
        "import torch\n"
        "ids = torch.tensor([[4, 4, 4, 4, 4, 7, 8]])\n"
        "out = engine.generate(pixel_values=torch.zeros(1, 3, 64, 64), input_ids=ids, max_new_tokens=3)\n"
        "assert out.sequences.shape[1] > 1\n"
        "unwanted = {'lightning', 'pytorch_lightning', 'open_clip', 'webdataset', 'matplotlib', 'torchmetrics'}\n"
        "print(sorted(unwanted & set(sys.modules)))\n"
    )
    root = Path(lightning_mue.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=root,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
