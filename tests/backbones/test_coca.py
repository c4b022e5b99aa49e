"""open_clip's CoCa as a transformers model: nothing uninitialised, folders, models of others, and what has no view."""

import json
import subprocess
import sys

import open_clip
import pytest
import torch
from open_clip.coca_model import CoCa
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForImageTextToText

from lightning_mue.backbones import backbone_config, build_backbone, fingerprint, view
from lightning_mue.backbones.coca_model import CoCaForConditionalGeneration, config_of
from lightning_mue.backbones.processor import build_processor
from lightning_mue.data.tokenizer import train_tokenizer
from lightning_mue.exits import attach_exits
from lightning_mue.export import freeze, load
from lightning_mue.inference import ExitEngine
from lightning_mue.policy import ExitPolicy, ExitRule
from tests import zoo

CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {
        "image_size": 64,
        "patch_size": 16,
        "width": 24,
        "layers": 3,
        "head_width": 6,
        "attentional_pool": True,
        "attn_pooler_queries": 6,
        "attn_pooler_heads": 4,
        "output_tokens": True,
    },
    "text_cfg": {
        "context_length": 20,
        "vocab_size": zoo.VOCABULARY,
        "width": 32,
        "heads": 4,
        "layers": 2,
        "embed_cls": True,
        "output_tokens": True,
    },
    "multimodal_cfg": {"context_length": 20, "width": 32, "heads": 4, "layers": 3},
}


def theirs(seed=0, **more):
    """A CoCa as a project has it: open_clip's, its projection filled by whoever trained it."""
    torch.manual_seed(seed)
    coca = CoCa(**{**CONFIG, **more})
    torch.nn.init.normal_(coca.text_decoder.text_projection, std=0.5)
    return coca.eval()


def logits(model, pixels, ids):
    with torch.no_grad():
        return model(pixel_values=pixels, decoder_input_ids=ids).logits


def test_nothing_is_left_uninitialised(monkeypatch):
    """Whatever open_clip takes from memory as it is: here that would be nan."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **how: empty(*size, **how).fill_(torch.nan))
    model = build_backbone({"model_type": "open_clip_coca", **CONFIG})
    monkeypatch.undo()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    upper = model.coca.text_decoder.text_projection
    assert upper.std().item() == pytest.approx(32**-0.5, rel=0.1)


def test_a_folder_gives_the_same_model_again(tmp_path):
    model = zoo.make("coca", exits=False)
    model.save_pretrained(tmp_path)
    pixels, ids = zoo.inputs("coca", 2)["pixel_values"], torch.randint(5, 90, (2, 6))
    for again in (
        AutoModelForImageTextToText.from_pretrained(tmp_path),
        build_backbone(str(tmp_path)),
        build_backbone(backbone_config(model)),
    ):
        again.load_state_dict(model.state_dict())  # the last one has other weights
        assert torch.equal(logits(again.eval(), pixels, ids), logits(model, pixels, ids))
        assert again.generation_config.suppress_tokens == [zoo.PAD]
        assert fingerprint(again) == fingerprint(model)


def test_a_coca_of_open_clip_is_viewed_as_it_is():
    coca = theirs()
    keys, pixels = set(coca.state_dict()), zoo.inputs("coca", 3)["pixel_values"]
    shell = CoCaForConditionalGeneration.wrap(coca)
    ids = torch.randint(5, 90, (3, 7))
    with torch.no_grad():
        expected = coca(pixels, ids, output_labels=False)["logits"]
    assert torch.equal(logits(shell, pixels, ids), expected)
    exits = attach_exits(coca, {"vision": [1, 2], "text": [1], "decoder": [3, 4]})
    assert {key for key in coca.state_dict() if not key.startswith("mue_exits.")} == keys
    settings = view(coca).decode_settings(8)
    assert (settings.start_id, settings.end_ids, settings.pad_id) == (zoo.VOCABULARY - 2, (zoo.VOCABULARY - 1,), 0)
    engine = ExitEngine(coca, ExitPolicy.full_depth())
    found = engine.generate(8, pixel_values=pixels).sequences
    assert found.tolist() == shell.generate(pixel_values=pixels, max_new_tokens=8).tolist()
    early = ExitEngine(coca, ExitPolicy({"decoder": ExitRule.static(3), "vision": ExitRule.static(1)}))
    assert set(early.generate(4, pixel_values=pixels).exit_depths["decoder"].flatten().tolist()) <= {0, 3}
    assert exits.layers["text"] == (1,)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"quick_gelu": True},
        {  # open_clip's own needs towers of one width here
            "vision_cfg": {**CONFIG["vision_cfg"], "width": 32, "head_width": 8, "attentional_pool": "cascade"},
        },
        {"vision_cfg": {**CONFIG["vision_cfg"], "ls_init_value": 0.1}},
        {"vision_cfg": {**CONFIG["vision_cfg"], "no_ln_pre": True, "mlp_ratio": 2.0, "image_size": [64, 32]}},
        {"text_cfg": {**CONFIG["text_cfg"], "proj_bias": True, "ls_init_value": 0.1}},
    ],
)
def test_its_config_is_read_off_the_model(more):
    coca = theirs(**more)
    again = CoCa(**config_of(coca).coca).eval()
    again.load_state_dict(coca.state_dict())
    size = coca.visual.image_size
    pixels, ids = torch.randn(2, 3, *size), torch.randint(5, 90, (2, 7))
    with torch.no_grad():
        expected, found = coca(pixels, ids), again(pixels, ids)
    for name in ("image_features", "text_features", "logits"):
        assert torch.equal(found[name], expected[name]), name


def test_what_has_no_view():
    coca = theirs()
    coca.visual = torch.nn.Linear(2, 2)
    with pytest.raises(TypeError, match="CoCa's `visual` must be open_clip's VisionTransformer, got Linear"):
        view(coca)
    custom = theirs(text_cfg={**CONFIG["text_cfg"], "qk_norm": True})
    with pytest.raises(TypeError, match="`text` must have open_clip's default blocks, got CustomResidualAttention"):
        view(custom)
    with pytest.raises(ValueError, match=r"Exits of 'decoder' must rise within 3..4 .*got \[2, 3\]"):
        attach_exits(theirs(), {"decoder": [2, 3]})
    with pytest.raises(ValueError, match=r"after layer 2, which has not read the picture; exits lie in 3..4"):
        ExitEngine(theirs(), ExitPolicy({"decoder": ExitRule.static(2)}))


@pytest.mark.slow
def test_open_clips_own_sizes_are_built_by_name_frozen_and_loaded(tmp_path):
    """coca_ViT-B-32: 254 M parameters, random weights, no network; two tokens with exits in both towers."""
    model = build_backbone("open_clip:coca_ViT-B-32").eval()
    assert 250e6 < sum(parameter.numel() for parameter in model.parameters()) < 260e6
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    attach_exits(model, {"vision": [4], "decoder": [16]})
    rules = {"vision": ExitRule.static(4), "decoder": ExitRule.static(16)}
    policy, pixels = ExitPolicy(rules), torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    out = ExitEngine(model, policy).generate(2, pixel_values=pixels)
    assert (out.exit_depths["vision"].tolist(), out.exit_depths["decoder"].tolist()) == ([4], [[16, 16]])
    loaded = load(freeze(model, policy, tmp_path / "bundle"))
    assert torch.equal(loaded.generate(2, pixel_values=pixels).sequences, out.sequences)


def test_random_weights_by_name_leave_nothing_as_it_was_in_memory(tmp_path):
    (tmp_path / "coca_by_name.json").write_text(json.dumps(CONFIG | {"custom_text": True}))
    open_clip.add_model_config(tmp_path / "coca_by_name.json")
    projection = build_backbone("open_clip:coca_by_name").coca.text_decoder.text_projection
    assert projection.std().item() == pytest.approx(32**-0.5, rel=0.1)


def test_a_folder_is_read_in_a_process_that_knows_no_coca_yet(tmp_path):
    zoo.make("coca", exits=False).save_pretrained(tmp_path)
    code = (
        f"from lightning_mue.backbones import build_backbone; print(type(build_backbone({str(tmp_path)!r})).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split()[-1] == "CoCaForConditionalGeneration"


def test_a_module_of_open_clip_gets_its_shell():
    coca = theirs()
    model = build_backbone(coca)
    assert model.coca is coca
    with pytest.raises(TypeError, match="CoCa has no config that would build it again"):
        backbone_config(coca)
    for tower, more in (
        ("text_cfg", {"norm_kwargs": {"eps": 0.1}}),
        ("vision_cfg", {"act_kwargs": {"approximate": "tanh"}}),
    ):
        with pytest.raises(ValueError, match="`norm_kwargs` or `act_kwargs` has no config here"):
            config_of(theirs(**{tower: CONFIG[tower] | more}))


def test_more_positions_than_there_are():
    decoder = view(zoo.shared("coca")).decoder
    assert decoder.embed(torch.ones(1, 64, dtype=torch.long), 0).shape == (1, 64, 32)
    with pytest.raises(ValueError, match="has 64 positions, got 65"):
        decoder.embed(torch.ones(1, 1, dtype=torch.long), 64)


def test_the_start_of_clips_frame_is_no_part_of_an_answer():
    """It stands before the answer; a CLIP tokenizer, as pretrained, writes it too."""
    processor = build_processor(train_tokenizer(["a red square"], 300), 64, 0)
    plain, tokenizer = processor.labels(["a red"]), processor.tokenizer.backend_tokenizer
    ids = [(word, tokenizer.token_to_id(word)) for word in ("<s>", "</s>")]
    tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    assert processor.tokenizer(["a red"])["input_ids"][0][0] == 1
    assert processor.labels(["a red"]).tolist() == plain.tolist()
