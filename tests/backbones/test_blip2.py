"""BLIP-2: what stands at the placeholders, whose settings are obeyed, what is refused."""

import pytest
import torch
from transformers import Blip2Config, Blip2ForConditionalGeneration

from lightning_mue.backbones import backbone_config, build_backbone, view
from lightning_mue.exits import attached
from lightning_mue.inference import ExitEngine
from lightning_mue.policy import ExitPolicy
from lightning_mue.training import Supervision
from lightning_mue.training.depths import Step
from lightning_mue.training.objective import objective
from lightning_mue.training.supervised import supervise
from tests import reference, zoo

LABELS = torch.randint(5, zoo.VOCABULARY, (3, 6), generator=torch.Generator().manual_seed(3))


def answers(model, tensors, runtime="torch", **how):
    engine = ExitEngine(model, ExitPolicy.full_depth(), runtime=runtime)
    return engine.generate(**tensors, **how).sequences.tolist()


@pytest.mark.parametrize("shift", [1, 3], ids=["after a word", "after three"])
def test_the_picture_stands_where_its_placeholders_are(shift):
    """Also amid the words, and elsewhere in each row."""
    model, tensors = zoo.shared("blip2"), zoo.inputs("blip2", 3)
    tensors["attention_mask"] = torch.ones_like(tensors["attention_mask"])
    for row in range(3):
        tensors["input_ids"][row] = tensors["input_ids"][row].roll(shift * row)
    expected = reference.generate(model, tensors)
    assert answers(model, tensors) == expected.tolist()
    other = tensors | {"pixel_values": tensors["pixel_values"].flip(0)}
    assert answers(model, other) != expected.tolist()


def test_a_caption_needs_no_prompt():
    """As published models are asked: their text config names a token with which a prompt would begin."""
    model, tensors = zoo.make("blip2"), zoo.picture_inputs(3)
    model.config.text_config.bos_token_id = 9
    expected = reference.generate(model, tensors).tolist()
    assert view(model).generate(tensors, num_beams=1, do_sample=False).tolist() == expected
    for runtime in ("torch", "onnxruntime"):
        assert answers(model, tensors, runtime) == expected


def test_full_depth_has_the_models_own_loss():
    model, tensors = zoo.make("blip2"), zoo.inputs("blip2", 3)
    found = supervise(view(model), attached(model), tensors, LABELS, {}).last.loss
    torch.testing.assert_close(found, model(**tensors, labels=LABELS).loss)


def test_all_that_learns_gets_a_gradient():
    """Else distributed training would wait for it."""
    model, tensors = zoo.make("blip2").train(), zoo.inputs("blip2", 3)
    objective(view(model), attached(model), tensors, LABELS, Step(), Supervision()).total.backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_the_language_models_generation_config_is_obeyed():
    """Of a module given as it is; one that is built has the model's, which a folder keeps, with the tokens it lacks."""
    torch.manual_seed(0)
    made = zoo.make("blip2", exits=False)
    model = Blip2ForConditionalGeneration(Blip2Config(**made.config.to_dict())).requires_grad_(False).eval()
    model.load_state_dict(made.state_dict())
    tensors = zoo.inputs("blip2", 2)
    model.language_model.generation_config.max_new_tokens = 5
    expected = reference.generate(model, tensors)
    assert expected.shape == (2, 6)
    assert answers(model, tensors) == expected.tolist()
    described = backbone_config(model)
    assert described["generation_config"]["max_new_tokens"] == 5
    again = build_backbone(described | {"generation_config": {"max_new_tokens": 4}})
    assert again.language_model.generation_config is again.generation_config
    assert view(again).decode_settings(None).plain == view(model).decode_settings(4).plain


@pytest.mark.parametrize("tied", [True, False], ids=["scaled", "as Flan-T5"])
def test_a_t5_whose_head_is_its_own(tied):
    """Flan-T5 says by it that what the head reads is not scaled."""
    config = backbone_config(zoo.make("blip2", exits=False))
    config["text_config"] = {"model_type": "t5", **zoo.T5, "tie_word_embeddings": tied}
    torch.manual_seed(0)
    model = build_backbone(config).requires_grad_(False).eval()
    assert model.language_model.config.scale_decoder_outputs == tied
    assert build_backbone(backbone_config(model)).language_model.config.scale_decoder_outputs == tied
    tensors = zoo.inputs("blip2", 2)
    out, executor = ExitEngine(model, ExitPolicy.full_depth()).run(4, None, False, tensors)
    expected = model(**tensors, decoder_input_ids=out.sequences[:, :-1]).logits[:, 0]
    torch.testing.assert_close(executor.exit_logits(5, slice(None), 0), expected, rtol=1e-4, atol=1e-4)


def test_a_decoder_alone_is_refused():
    shape = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = {"model_type": "opt", "vocab_size": 97, "word_embed_proj_dim": 32, "max_position_embeddings": 64, **shape}
    model = build_backbone(backbone_config(zoo.make("blip2", exits=False)) | {"text_config": text})
    with pytest.raises(TypeError, match=r"around OPTForCausalLM has no view.* A decoder alone has no cross-attention"):
        view(model)


def test_what_cannot_be_read_is_refused():
    model, tensors = zoo.make("blip2"), zoo.inputs("blip2", 2)
    tensors["input_ids"][1, 0] = 9
    with pytest.raises(ValueError, match=r"token \(4\) as often as there are queries, 5 times; got \[5, 4\]"):
        answers(model, tensors)
    model.config.image_token_id = None
    with pytest.raises(ValueError, match="must name `image_token_index`"):
        view(model)
    with pytest.raises(ValueError, match=r"must be \[Blip2For.*got \['Blip2ForImageTextRetrieval'\]"):
        build_backbone(backbone_config(model) | {"architectures": ["Blip2ForImageTextRetrieval"]})
