"""A BART or mBART decoder worked out position by position, with plain lists of keys and values."""

import torch
from torch.nn.functional import gelu

from tests import reference


def token_by_token(model, memory_SD, ids, depths):
    """Return the state with which each position leaves after ``depths[t]`` layers.

    Layers above get the keys and values that they project from that state (CALM, section 3.1).
    """
    decoder = reference.decoder(model)
    prenorm = hasattr(decoder, "layer_norm")
    seen = [([], []) for _ in decoder.layers]
    left = []
    for t, (token, depth) in enumerate(zip(ids, depths, strict=True)):
        place = decoder.embed_positions.weight[t + decoder.embed_positions.offset]
        h = decoder.layernorm_embedding(decoder.embed_tokens(torch.tensor(token)) + place)
        for k, (layer, (keys, values)) in enumerate(zip(decoder.layers, seen, strict=True), 1):
            x = layer.self_attn_layer_norm(h) if prenorm else h
            keys.append(layer.self_attn.k_proj(x))
            values.append(layer.self_attn.v_proj(x))
            if k <= depth:
                h = one_layer(layer, h, torch.stack(keys), torch.stack(values), memory_SD, prenorm)
        left.append(h)
    return left


def one_layer(layer, h, keys_TD, values_TD, memory_SD, prenorm):
    cross = layer.encoder_attn
    parts = [
        (layer.self_attn_layer_norm, lambda x: attend(layer.self_attn, x, keys_TD, values_TD)),
        (layer.encoder_attn_layer_norm, lambda x: attend(cross, x, cross.k_proj(memory_SD), cross.v_proj(memory_SD))),
        (layer.final_layer_norm, lambda x: layer.fc2(gelu(layer.fc1(x)))),
    ]
    for norm, part in parts:
        h = h + part(norm(h)) if prenorm else norm(h + part(h))
    return h


def attend(attention, x, keys_TD, values_TD):
    heads = attention.num_heads
    query, keys, values = (y.unflatten(-1, (heads, -1)) for y in (attention.q_proj(x), keys_TD, values_TD))
    weights = torch.einsum("hd,thd->ht", query, keys).div(query.shape[-1] ** 0.5).softmax(-1)
    return attention.out_proj(torch.einsum("ht,thd->hd", weights, values).flatten())
