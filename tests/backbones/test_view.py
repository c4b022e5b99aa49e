"""Streams without exits and without a cache: the backbone's own forward, as training runs it."""

import pytest
import torch

from lightning_mue.backbones import exit_streams, num_layers, view
from lightning_mue.backbones.stream import causal_mask
from tests import reference, zoo


@pytest.mark.parametrize("name", list(zoo.BACKBONES))
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_layers_one_after_another_are_the_forward(name, attention):
    model, tensors = zoo.make(name), zoo.inputs(name, 3)
    model.set_attn_implementation(attention)
    ids = torch.randint(5, zoo.VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(0))
    expected, logits = reference.decoder_states(model, tensors, ids)
    backbone, done = view(model), {}
    for stream in backbone.encoders:
        state = stream.prologue(tensors, done)
        assert state.h_BTD.shape[-1] == stream.width
        for k in range(1, stream.num_layers + 1):
            state.h_BTD = stream.layer(k, state)
        done[stream.name] = stream.epilogue(state)
    memory, memory_mask, decoder = backbone.memory(done), backbone.memory_mask(tensors), backbone.decoder
    h = decoder.embed(ids, 0)
    for k in range(1, decoder.num_layers + 1):
        mask = causal_mask(0, ids.shape[1], h.dtype, h.device, decoder.distance_bias(), decoder.window(k))
        torch.testing.assert_close(h, expected[k - 1], rtol=1e-4, atol=1e-4)
        h = decoder.layer(k, h, memory, mask, memory_mask)
    torch.testing.assert_close(decoder.norm(h), expected[-1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(decoder.head(decoder.norm(h)), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", list(zoo.BACKBONES))
def test_the_streams_are_those_that_the_exits_name(name):
    layers = exit_streams(view(zoo.make(name)))
    assert set(zoo.exit_layers(name)) <= set(layers)
    assert all(exits[-1] < layers[stream] for stream, exits in zoo.exit_layers(name).items())
    plain = view(zoo.make(name, exits=False))
    vision, encoder = ["vision"] * zoo.has_vision(name), ["encoder"] * zoo.reads_prompts(name)
    assert list(num_layers(plain)) == [*vision, *encoder, "decoder"]  # without exits as pretrained
