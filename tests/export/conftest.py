import shutil

import pytest

from lightning_mue.backbones import build_backbone
from lightning_mue.backbones.processor import build_processor
from lightning_mue.data.tokenizer import train_tokenizer
from lightning_mue.export import freeze
from lightning_mue.policy import ExitPolicy, ExitRule
from tests import zoo


def mixed_policy(name):
    """Return a policy in which rows leave every stream at different layers."""
    signals = {"decoder": ("gate", 0.5)}
    rules = {}
    for stream, layers in zoo.exit_layers(name).items():
        signal, threshold = signals.get(stream, ("gate", 0.45))
        rules[stream] = ExitRule(signal, layers, [threshold] * len(layers))
    return ExitPolicy(rules)


@pytest.fixture(scope="session")
def make_processor():
    def make():
        return build_processor(train_tokenizer(["what is this?", "a red square left of it"], 300), 64, zoo.IMAGE_TOKENS)

    return make


@pytest.fixture(scope="session")
def talking_model(make_processor):
    """A tiny Florence-2 whose vocabulary is the processor's."""
    config = zoo.tiny_florence2().config.to_dict()
    config["text_config"]["vocab_size"] = len(make_processor().tokenizer)
    config["text_config"] |= {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "pad_token_id": 0}
    generation = {"decoder_start_token_id": 2, "eos_token_id": 2, "pad_token_id": 0, "max_new_tokens": 6}
    return build_backbone(config | {"generation_config": generation}).eval()


@pytest.fixture(scope="session")
def bundle_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("once") / "bundle"
    return freeze(zoo.make("florence2"), mixed_policy("florence2"), folder)


@pytest.fixture
def bundle(bundle_once, tmp_path):
    """A bundle that a test may damage."""
    return shutil.copytree(bundle_once, tmp_path / "bundle")
