"""Invariants 1 and 2: exits change no full-depth output; the full-depth engine is the backbone's own ``generate``."""

import pytest
import torch

from lightning_mue.exits import PREFIX, ExitConfig, attach_exits, detach_exits
from lightning_mue.inference import ExitEngine
from lightning_mue.policy import ExitPolicy
from tests import zoo

BACKBONES = list(zoo.BACKBONES)


@pytest.mark.parametrize("name", BACKBONES)
def test_attaching_changes_no_output_and_no_key(name):
    model = zoo.make(name, exits=False)
    batch = zoo.inputs(name, 3)
    ids = torch.randint(5, 90, (3, 7))
    before, keys = model(**batch, decoder_input_ids=ids).logits, set(model.state_dict())
    attach_exits(model, ExitConfig(**zoo.exit_layers(name)))
    after = model(**batch, decoder_input_ids=ids).logits
    assert torch.equal(before, after)
    new = set(model.state_dict()) - keys
    assert new
    assert all(key.startswith(f"{PREFIX}.") for key in new)
    assert keys <= set(model.state_dict())
    detach_exits(model)
    assert set(model.state_dict()) == keys


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_full_depth_equals_generate(name, batch, seed):
    model = zoo.make(name, seed)
    tensors = zoo.inputs(name, batch, seed)
    expected = model.generate(**tensors, num_beams=1, do_sample=False, max_new_tokens=14)
    found = ExitEngine(model, ExitPolicy.full_depth()).generate(**tensors, max_new_tokens=14).sequences
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize(
    "settings", [{"no_repeat_ngram_size": 2}, {"forced_bos_token_id": 9}, {"forced_eos_token_id": zoo.END}]
)
def test_generation_config_is_obeyed(name, settings):
    model = zoo.make(name)
    tensors = zoo.inputs(name, 3)
    for key, value in settings.items():
        setattr(model.generation_config, key, value)
    expected = model.generate(**tensors, num_beams=1, do_sample=False, max_new_tokens=9)
    found = ExitEngine(model, ExitPolicy.full_depth()).generate(**tensors, max_new_tokens=9).sequences
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("name", BACKBONES)
def test_constrained_answers_equal_generate(name):
    model = zoo.make(name)
    tensors = zoo.inputs(name, 4)

    def allowed(_, ids):
        return [11, 12, 13] if len(ids) < 3 else [zoo.END]

    expected = model.generate(**tensors, num_beams=1, do_sample=False, prefix_allowed_tokens_fn=allowed)
    engine = ExitEngine(model, ExitPolicy.full_depth())
    assert engine.generate(**tensors, prefix_allowed_tokens_fn=allowed).sequences.tolist() == expected.tolist()


@pytest.mark.parametrize("name", BACKBONES)
def test_unsupported_generation_settings_are_refused(name):
    model = zoo.make(name)
    model.generation_config.repetition_penalty = 1.3
    with pytest.raises(ValueError, match="repetition_penalty"):
        ExitEngine(model, ExitPolicy.full_depth()).generate(**zoo.inputs(name, 1))
