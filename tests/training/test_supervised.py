"""Deep supervision against the backbone's own forward."""

import pytest
import torch
from torch.nn.functional import cross_entropy, log_softmax
from transformers import T5Gemma2ForConditionalGeneration
from transformers.models.t5gemma2.modeling_t5gemma2 import T5Gemma2RMSNorm

from lightning_mue.backbones import num_layers, view
from lightning_mue.exits import attached
from lightning_mue.training.supervised import exit_result, supervise
from tests import reference, zoo

BACKBONES = list(zoo.BACKBONES)


def batch_of(name, size=3):
    labels = torch.randint(5, 90, (size, 6), generator=torch.Generator().manual_seed(3))
    labels[0, 4:] = -100
    return zoo.inputs(name, size), labels


def upper_outputs(model):
    """Return what writes into the decoder's states above its first layer (CoCa: above the first that can be left)."""
    if (coca := getattr(model, "coca", None)) is not None:
        blocks = [*coca.text_decoder.resblocks[1:], *coca.text_decoder.cross_attn[1:]]
        return [part for block in blocks for part in (block.attn.out_proj, block.mlp.c_proj)]
    decoder = reference.decoder(model)
    if hasattr(decoder, "h"):
        return [part.c_proj for block in decoder.h[1:] for part in (block.mlp, block.attn, block.crossattention)]
    if reference.is_blip(model):
        return [
            part.output.dense for layer in decoder.layer[1:] for part in (layer.attention, layer.crossattention, layer)
        ]
    if reference.is_t5(model):
        names = ("SelfAttention.o", "EncDecAttention.o", "DenseReluDense.wo")
        return [block.layer[i].get_submodule(name) for block in decoder.block[1:] for i, name in enumerate(names)]
    layers = decoder.layers[1:]
    if isinstance(model, T5Gemma2ForConditionalGeneration):
        names = ("post_self_attn_layernorm", "post_feedforward_layernorm")
        return [getattr(layer, name) for layer in layers for name in names]
    return [part for layer in layers for part in (layer.fc2, layer.self_attn.out_proj, layer.encoder_attn.out_proj)]


def agreeable(model):
    """Make exits agree with the last layer now and then, as those of a trained model do."""
    with torch.no_grad():
        for part in upper_outputs(model):
            part.weight *= 0.06
            if type(part) is T5Gemma2RMSNorm:
                part.weight -= 0.94  # it multiplies by one more
        for parameter in attached(model).adapters.parameters():
            parameter *= 0.1
    return model


def reference_logits(model, name, tensors, labels):
    """Exit layer (or last) -> logits ``[B, T, V]``, from the model's own hidden states, norm and head."""
    ids = torch.cat([torch.full((len(labels), 1), zoo.START), labels[:, :-1]], 1)
    states, logits = reference.decoder_states(model, tensors, ids.where(ids >= 0, zoo.PAD))
    early = {k: reference.exit_logits(model, k, states[k]) for k in zoo.exit_layers(name)["decoder"]}
    return early | {num_layers(view(model))["decoder"]: logits}


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_exit_loss_is_the_shared_head_on_the_adapted_state(name, attention):
    model = zoo.make(name)
    model.set_attn_implementation(attention)
    tensors, labels = batch_of(name)
    found = supervise(view(model), attached(model), tensors, labels, {})
    expected = reference_logits(model, name, tensors, labels)
    assert list(found.results) == list(expected)
    for k, logits in expected.items():
        loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        torch.testing.assert_close(found.results[k].loss, loss)
        assert found.results[k].tokens_N.equal(logits.argmax(-1)[labels >= 0])
        assert found.results[k].divergence is None


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_divergence_is_that_of_the_two_distributions(name, temperature):
    model = zoo.make(name)
    tensors, labels = batch_of(name)
    found = supervise(view(model), attached(model), tensors, labels, {}, distill_temperature=temperature)
    *early, last = (
        log_softmax(logits[labels >= 0] / temperature, -1)
        for logits in reference_logits(model, name, tensors, labels).values()
    )
    for result, student in zip(found.results.values(), early, strict=False):
        nats = (last.exp() * (last - student)).sum(-1)
        torch.testing.assert_close(result.divergence, nats.mean() * temperature**2)
    assert found.last.divergence is None


def test_no_logits_are_kept_for_the_backward_pass():
    model = zoo.make("florence2")
    tensors, labels = batch_of("florence2")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        found = supervise(view(model), attached(model), tensors, labels, {}, distill_temperature=1.0)
    assert kept
    assert [shape for shape in kept if shape == ((labels >= 0).sum(), zoo.VOCABULARY)] == []
    sum(result.loss for result in found.results.values()).backward()


def test_asking_for_some_layers_gives_them_alone():
    model = zoo.make("florence2")
    tensors, labels = batch_of("florence2")
    everything = supervise(view(model), attached(model), tensors, labels, {"encoder": 1})
    some = supervise(view(model), attached(model), tensors, labels, {"encoder": 1}, [2, 5])
    assert list(some.results) == [2, 5]
    assert all(torch.equal(some.results[k].loss, everything.results[k].loss) for k in (2, 5))
    assert torch.equal(some.agrees(2), everything.results[2].tokens_N == everything.results[5].tokens_N)


def test_an_exit_result_has_the_gradient_of_its_loss():
    """Recomputing in the backward pass changes no gradient."""
    model = zoo.make("florence2")
    tensors, labels = batch_of("florence2")
    backbone, exits = view(model), attached(model)
    h = supervise(backbone, exits, tensors, labels, {}).states[2].detach().requires_grad_()
    exit_result(backbone, exits, 2, h, labels).loss.backward()
    found, h.grad = h.grad, None
    logits = model.lm_head(exits.adapters["decoder_2"](h))
    cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100).backward()
    torch.testing.assert_close(found, h.grad)
