"""T5 and UDOP: what no model of the zoo shows, what is never read, and what is refused."""

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    T5ForConditionalGeneration,
    UdopForConditionalGeneration,
)

from lightning_mue.backbones import backbone_config, build_backbone, fingerprint, view
from lightning_mue.backbones.stream import causal_mask
from lightning_mue.exits import ExitConfig, attach_exits, attached
from lightning_mue.export import freeze
from lightning_mue.inference import ExitEngine
from lightning_mue.policy import ExitPolicy
from lightning_mue.training import Supervision
from lightning_mue.training.depths import Step
from lightning_mue.training.objective import objective
from lightning_mue.training.supervised import supervise
from tests import reference, zoo

NAMES = ["t5", "udop"]
LABELS = torch.randint(5, zoo.VOCABULARY, (3, 6), generator=torch.Generator().manual_seed(3))


def old_t5(**changed):
    """As the first T5s: an FFN without gates, a decoder shallower than the encoder, and answers that start with pad."""
    generation = {"decoder_start_token_id": zoo.PAD, "eos_token_id": zoo.END, "pad_token_id": zoo.PAD}
    config = zoo.T5 | {"feed_forward_proj": "relu", "num_decoder_layers": 3, "decoder_start_token_id": zoo.PAD}
    torch.manual_seed(0)
    config |= {"model_type": "t5", "generation_config": generation | {"max_new_tokens": 12}}
    return zoo.talkative(build_backbone(config | changed)).requires_grad_(False).eval()


def says_what_transformers_says(model, tensors, layers):
    """Logits along the answer of so many layers, and the answer itself, which is returned."""
    out, executor = ExitEngine(model, ExitPolicy.full_depth()).run(12, None, False, tensors)
    assert out.sequences.tolist() == reference.generate(model, tensors).tolist()
    assert len({*out.sequences.flatten().tolist()}) > 3
    ids = out.sequences[:, :-1]
    expected = model(**tensors, decoder_input_ids=ids).logits
    for t in range(ids.shape[1]):
        found = executor.exit_logits(layers, slice(None), t)
        going = (ids[:, 1 : t + 1] != zoo.END).all(1)
        torch.testing.assert_close(found[going], expected[going, t], rtol=1e-3, atol=1e-3)
    return out.sequences.tolist()


@pytest.mark.parametrize("changed", [{}, {"tie_word_embeddings": False}], ids=["scaled", "as T5 1.1"])
def test_other_t5s_say_what_transformers_says(changed):
    """T5 1.1 says by its untied head that what it reads is not scaled; transformers ties it all the same."""
    model, tensors = old_t5(**changed), zoo.text_inputs(3)
    assert model.config.scale_decoder_outputs == (not changed)
    again = build_backbone(backbone_config(model))
    assert again.config.scale_decoder_outputs == model.config.scale_decoder_outputs
    says_what_transformers_says(model, tensors, 3)


@pytest.mark.parametrize("name", NAMES)
def test_the_mask_of_a_block_is_the_bias_of_the_first_layer(name):
    """Also past the distances that it tells apart."""
    model = zoo.shared(name)
    bias = view(model).decoder.distance_bias()
    assert bias.shape[1] == 13
    whole = model.decoder.block[0].layer[0].SelfAttention.compute_bias(30, 30)[0]
    for first, last in ((0, 1), (29, 30), (0, 30), (20, 24)):
        found = causal_mask(first, last, torch.float32, bias.device, bias)
        assert found.shape == (1, 4, last - first, last)
        seen = torch.ones(30, 30, dtype=torch.bool).tril()[first:last, :last]
        assert torch.equal(found[0, :, seen], whole[:, first:last, :last][:, seen])
        assert (found[0, :, ~seen] == torch.finfo(torch.float32).min).all()


@pytest.mark.parametrize("name", NAMES)
def test_full_depth_has_the_models_own_loss(name):
    model, tensors = zoo.make(name), zoo.inputs(name, 3)
    found = supervise(view(model), attached(model), tensors, LABELS, {}).last.loss
    torch.testing.assert_close(found, model(**tensors, labels=LABELS).loss)


@pytest.mark.parametrize("name", NAMES)
def test_all_that_learns_gets_a_gradient(name):
    """Else distributed training would wait for it."""
    model, tensors = zoo.make(name).train(), zoo.inputs(name, 3)
    objective(view(model), attached(model), tensors, LABELS, Step(), Supervision()).total.backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_weights_that_udop_never_reads_are_no_part_of_the_fingerprint():
    model, tensors = zoo.make("udop", exits=False), zoo.inputs("udop", 2)
    before = fingerprint(model), reference.generate(model, tensors).tolist()
    with torch.no_grad():
        model.decoder.embed_patches.proj.weight.add_(1)
        model.decoder.relative_bias.biases[1].relative_attention_bias.weight.add_(1)
    assert (fingerprint(model), reference.generate(model, tensors).tolist()) == before
    with torch.no_grad():
        model.encoder.relative_bias.biases[1].relative_attention_bias.weight.add_(1)
    assert fingerprint(model) != before[0]


BOXES = {
    "one patch": torch.full((2, 10, 4), 0.3),
    "corners": torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(2, 10, 4),
    "edges": torch.tensor([[0.5, 0.25, 1.0, 0.75], [1.0, 1.0, 1.0, 1.0]] * 5).expand(2, 10, 4),
    "integers": torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]] * 5).expand(2, 10, 4),
}


CASES = [(boxes, without) for boxes in BOXES for without in ("", "attention_mask", "pixel_values")]


@pytest.mark.parametrize(("boxes", "without"), CASES[:-1])  # of integers alone transformers takes no mean
def test_words_and_patches_are_laid_out_as_by_udop(boxes, without):
    model, tensors = zoo.shared("udop"), zoo.page_inputs(2) | {"bbox": BOXES[boxes]}
    tensors.pop(without, None)
    expected = model.encoder(**{name: tensor.clone() for name, tensor in tensors.items()})
    backbone = view(model)
    (stream,) = backbone.encoders
    state = stream.prologue(tensors, {})
    for k in range(1, stream.num_layers + 1):
        state.h_BTD = stream.layer(k, state)
    torch.testing.assert_close(stream.epilogue(state), expected.last_hidden_state, rtol=1e-4, atol=1e-4)
    mask = backbone.memory_mask(tensors)
    shape = expected.attention_mask.shape
    seen = torch.ones(shape, dtype=torch.bool) if mask is None else mask[:, 0, 0] == 0
    assert torch.equal(seen, expected.attention_mask.bool())


def test_words_without_boxes_are_refused():
    tensors = zoo.page_inputs(2)
    del tensors["bbox"]
    with pytest.raises(ValueError, match=r"UDOP reads words where they stand; give `bbox`, \[B, T, 4\]"):
        ExitEngine(zoo.shared("udop"), ExitPolicy.full_depth()).generate(**tensors)


@pytest.mark.parametrize(("name", "kind"), [("t5", T5ForConditionalGeneration), ("udop", UdopForConditionalGeneration)])
def test_a_bundle_of_graphs_is_refused(name, kind, tmp_path):
    pytest.importorskip("onnxscript")
    with pytest.raises(ValueError, match=rf"pictures and prompts, and {kind.__name__} reads \['input_ids'"):
        freeze(zoo.make(name), ExitPolicy.full_depth(), tmp_path / "bundle", runtime="onnxruntime")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("kind", ["bart", "mbart"])
def test_barts_that_read_text_alone(kind, tmp_path):
    """Answers, loss and what a folder of transformers gives, against the model itself."""
    torch.manual_seed(0)
    model, tensors = make_bart(kind), zoo.text_inputs(3)
    expected = reference.generate(model, tensors, max_new_tokens=9).tolist()
    assert len({token for row in expected for token in row}) > 2
    model.save_pretrained(tmp_path)
    for same in (model, build_backbone(str(tmp_path)).eval()):
        for runtime in ("torch", "onnxruntime")[: 2 if kind == "bart" else 1]:
            engine = ExitEngine(same, ExitPolicy.full_depth(), runtime=runtime)
            assert engine.generate(**tensors, max_new_tokens=9).sequences.tolist() == expected
    attach_exits(model, ExitConfig(encoder=[1, 2], decoder=[1, 2]))
    found = supervise(view(model), attached(model), tensors, LABELS, {}).last.loss
    ids = torch.cat([torch.full((3, 1), zoo.START), LABELS[:, :-1]], 1)  # mBART itself would start with the last token
    torch.testing.assert_close(found, model(**tensors, labels=LABELS, decoder_input_ids=ids).loss)
    with pytest.raises(ValueError, match=r"The prompt has 65 tokens.*`max_position_embeddings` is 64"):
        view(model).encoders[0].prologue(zoo.text_inputs(1, prompt=65), {})
    model.final_logits_bias += 1
    with pytest.raises(ValueError, match="adds `final_logits_bias` to its logits"):
        view(model)


def make_bart(kind):
    ids = {"pad_token_id": zoo.PAD, "bos_token_id": zoo.START, "eos_token_id": zoo.END, "decoder_start_token_id": 2}
    shape = {"encoder_layers": 3, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "init_std": 0.3}
    sizes = {"vocab_size": zoo.VOCABULARY, "max_position_embeddings": 64, "scale_embedding": True}
    config = {"model_type": kind, **zoo.BART, **shape, **sizes, **ids, "generation_config": ids}
    return build_backbone(config).requires_grad_(False).eval()


def test_why_a_model_is_out_is_said():
    small = {"vocab_size": 9, "n_embd": 8, "n_layer": 1, "n_head": 1}
    with pytest.raises(TypeError, match=r"GPT2LMHeadModel has no view; .* Its decoder has no cross-attention"):
        view(GPT2LMHeadModel(GPT2Config(**small)))
