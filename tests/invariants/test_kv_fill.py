"""Fill modes for comparison: against transformers' own layers and cache, one row and one position at a time."""

from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, T5Gemma2ForConditionalGeneration

from lightning_mue.policy import KV_FILLS, ExitPolicy
from tests import reference, zoo
from tests.invariants.policies import STEPS, generate, random_depths

BACKBONES = list(zoo.BACKBONES)
ROWS = 3
MODES = [("just-in-time", 0), *((fill, backlog) for fill in ("propagate", "copy") for backlog in (0, 1))]


class OneRow:
    """A decoder of transformers with transformers' cache, whose layers are called for single positions in order."""

    def __init__(self, model, tensors, fill, backlog):
        self.model, self.fill, self.backlog = model, fill, backlog
        self.decoder, self.memory = reference.decoder(model), reference.memory(model, tensors)
        self.layers = getattr(*reference.layers_at(model, "decoder"))
        self.cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        self.states = [[] for _ in range(len(self.layers) + 1)]
        self.pairs = self.filled = 0

    def keys_and_values(self, layer):
        cached = self.cache.self_attention_cache.layers[layer - 1]
        return cached.keys, cached.values

    def run(self, layer, h, cache):
        found = self.layers[layer - 1](h, encoder_hidden_states=self.memory, past_key_values=cache)
        return found[0] if isinstance(found, tuple) else found

    def embed(self, token):
        decoder, token, position = self.decoder, torch.tensor([[token]]), len(self.states[0])
        if hasattr(decoder, "wte"):
            self.states[0].append(decoder.wte(token) + decoder.wpe.weight[position])
            return
        if reference.is_blip(self.model):
            embeddings = self.model.text_decoder.bert.embeddings
            self.states[0].append(embeddings(token, past_key_values_length=position))
            return
        h = decoder.embed_tokens(token) + decoder.embed_positions.weight[position + 2]
        self.states[0].append(decoder.layernorm_embedding(h))

    def catch_up(self, layer):
        """Give ``layer`` every position that it misses, the newest last."""
        newest = len(self.states[0]) - 1
        for position in range(len(self.states[layer]), newest + 1):
            below = self.states[layer - 1][position]
            if self.fill == "just-in-time" or position >= newest - self.backlog:
                self.states[layer].append(self.run(layer, below, self.cache))
                self.pairs += 1
                continue
            self.states[layer].append(below)
            self.filled += 1
            if self.fill == "propagate":
                self.run(layer, below, self.cache)  # only its K/V are kept
            else:
                key, value = (t[:, :, position : position + 1] for t in self.keys_and_values(layer - 1))
                self.cache.self_attention_cache.update(key, value, layer - 1)

    def logits(self, depth, h):
        if depth == len(self.layers):
            return reference.head(self.model)(reference.final_norm(self.model)(h))
        return reference.exit_logits(self.model, depth, h)

    @torch.no_grad()
    def decode(self, depths):
        tokens = [zoo.START]
        for depth in depths:
            self.embed(tokens[-1])
            for layer in range(1, depth + 1):
                self.catch_up(layer)
            h = self.states[depth][-1]
            tokens.append(int(reference.suppressed(self.model, self.logits(depth, h)).argmax()))
            if tokens[-1] == zoo.END:
                break
        return tokens


class OneRowOfCoCa(OneRow):
    """CoCa's blocks over K/V that lie in lists; torch's attention would project them anew."""

    def __init__(self, model, tensors, fill, backlog):
        self.model, self.fill, self.backlog, self.coca = model, fill, backlog, model.coca
        self.memory = self.coca(tensors["pixel_values"])["image_embs"]
        text, decoder = self.coca.text.transformer.resblocks, self.coca.text_decoder
        self.layers = [*((block, None) for block in text), *zip(decoder.resblocks, decoder.cross_attn, strict=True)]
        self.kv = [[] for _ in self.layers]
        self.cache = SimpleNamespace(self_attention_cache=SimpleNamespace(update=self.update))
        self.states = [[] for _ in range(len(self.layers) + 1)]
        self.pairs = self.filled = 0

    def update(self, key, value, index):
        self.kv[index].append((key, value))

    def keys_and_values(self, layer):
        return [torch.cat(kv, 2) for kv in zip(*self.kv[layer - 1], strict=True)]

    def run(self, layer, h, cache):
        block, cross = self.layers[layer - 1]
        heads = block.attn.num_heads
        projected = torch.nn.functional.linear(block.ln_1(h), block.attn.in_proj_weight, block.attn.in_proj_bias)
        query, key, value = projected.view(1, 1, 3 * heads, -1).transpose(1, 2).chunk(3, 1)
        self.update(key, value, layer - 1)
        keys, values = self.keys_and_values(layer)
        weights = (query @ keys.mT / query.shape[-1] ** 0.5).softmax(-1)
        h = h + block.attn.out_proj((weights @ values).transpose(1, 2).flatten(2))
        h = h + block.mlp(block.ln_2(h))
        return h if cross is None else cross(h, self.memory, self.memory)

    def embed(self, token):
        text, position = self.coca.text, len(self.states[0])
        self.states[0].append(text.token_embedding(torch.tensor([[token]])) + text.positional_embedding[position])

    def logits(self, depth, h):
        if depth == len(self.layers):
            return reference.final_norm(self.model)(h) @ self.coca.text_decoder.text_projection
        return reference.exit_logits(self.model, depth, h)


class OneRowOfT5(OneRow):
    """Blocks are told how far back positions are; of a UDOP's memory they see what its encoder says."""

    def __init__(self, model, tensors, fill, backlog):
        super().__init__(model, tensors, fill, backlog)
        if "bbox" in tensors:
            self.memory = self.memory[:, model.encoder(**tensors).attention_mask[0].bool()]

    def run(self, layer, h, cache):
        first, seen = self.layers[0].layer[0].SelfAttention, cache.get_seq_length(layer - 1)
        bias = first.compute_bias(1, seen + 1, past_seen_tokens=seen)
        return self.layers[layer - 1](h, None, bias, self.memory, past_key_values=cache)[0]

    def embed(self, token):
        self.states[0].append(self.decoder.embed_tokens(torch.tensor([[token]])))


class OneRowOfT5Gemma2(OneRow):
    """Layers are told a position's angles, and what their window hides of the tokens before."""

    def run(self, layer, h, cache):
        module, position = self.layers[layer - 1], cache.get_seq_length(layer - 1)
        angles = self.decoder.rotary_emb(h, torch.tensor([[position]]), module.attention_type)
        seen = torch.ones(1, 1, 1, position + 1 + self.memory.shape[1], dtype=torch.bool)
        if module.attention_type == "sliding_attention":
            seen[..., : max(0, position + 1 - self.decoder.config.sliding_window)] = False
        return module(h, angles, seen, past_key_values=cache, encoder_hidden_states=self.memory)

    def embed(self, token):
        self.states[0].append(self.decoder.embed_tokens(torch.tensor([[token]])))


def one_row(model, *given):
    kind = OneRowOfCoCa if hasattr(model, "coca") else OneRow
    if isinstance(model, T5Gemma2ForConditionalGeneration):
        kind = OneRowOfT5Gemma2
    return (OneRowOfT5 if reference.is_t5(model) else kind)(model, *given)


def positions(out):
    """Return row, position and exit depth of every token."""
    depths = out.exit_depths["decoder"]
    return [(row, t, int(depths[row, t])) for row, t in depths.nonzero().tolist()]


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize(("fill", "backlog"), MODES)
def test_every_mode_is_what_single_positions_give(name, fill, backlog):
    model, tensors = zoo.shared(name), zoo.inputs(name, ROWS)
    depths = random_depths(name, ROWS)
    out, executor = generate(model, ExitPolicy(kv_fill=fill, backlog=backlog), tensors, depths)
    pairs = filled = 0
    for row in range(ROWS):
        single = one_row(model, zoo.alone(tensors, row), fill, backlog)
        with torch.no_grad():
            tokens = single.decode(depths[row])
        assert out.sequences[row, : len(tokens)].tolist() == tokens
        pairs, filled = pairs + single.pairs, filled + single.filled
        for layer in range(1, executor.num_layers + 1):
            length = len(single.states[layer])
            if length == 0:
                continue
            keys, values = single.keys_and_values(layer)
            states = torch.cat(single.states[layer], 1)
            for mine, theirs in (
                (executor._keys[layer, row, :, :length], keys[0]),
                (executor._values[layer, row, :, :length], values[0]),
                (executor.states[layer, row, :length], states[0]),
            ):
                # States that are made up grow, and with them what runtimes round differently.
                torch.testing.assert_close(torch.as_tensor(mine), theirs, rtol=1e-3, atol=1e-3)
    assert (out.pairs, out.filled) == (pairs, filled)
    assert (filled > 0) == (fill != "just-in-time")


@pytest.mark.parametrize("name", BACKBONES)
def test_modes_differ(name):
    """Else the tests above would not tell them apart."""
    model, tensors = zoo.shared(name), zoo.inputs(name, ROWS)
    depths = random_depths(name, ROWS)
    found = [generate(model, ExitPolicy(kv_fill=fill, backlog=m), tensors, depths) for fill, m in MODES]
    for (one, mine), (other, theirs) in combinations(found, 2):
        values = [
            (mine._values[layer, row, :, : t + 1], theirs._values[layer, row, :, : t + 1])
            for row, t, depth in positions(one)
            for layer in range(1, depth + 1)
        ]
        assert one.sequences.tolist() != other.sequences.tolist() or not all(
            torch.allclose(*map(torch.as_tensor, both), atol=1e-2) for both in values
        )


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("fill", KV_FILLS[1:])
def test_a_backlog_of_the_whole_length_is_just_in_time(name, fill):
    model, tensors = zoo.shared(name), zoo.inputs(name, ROWS)
    depths = random_depths(name, ROWS)
    exact, theirs = generate(model, ExitPolicy(), tensors, depths)
    found, mine = generate(model, ExitPolicy(kv_fill=fill, backlog=STEPS), tensors, depths)
    assert found.sequences.tolist() == exact.sequences.tolist()
    assert (found.pairs, found.filled) == (exact.pairs, 0)
    for row, position, depth in positions(exact):
        both = (torch.as_tensor(e.states[: depth + 1, row, position]) for e in (mine, theirs))
        assert torch.equal(*both)


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("backlog", [0, 1, 3])
def test_every_position_is_computed_or_filled(name, backlog):
    """``pairs + filled`` is what just-in-time computes; one run computes ``backlog + 1`` positions at most."""
    model, tensors = zoo.shared(name), zoo.inputs(name, 1)
    (depths,) = random_depths(name, 1, seed=backlog)
    found, _ = generate(model, ExitPolicy(kv_fill="propagate", backlog=backlog), tensors, [depths])
    depths = depths[: found.sequences.shape[1] - 1]
    pairs = filled = 0
    for layer in range(1, max(depths) + 1):
        reached = [t for t, depth in enumerate(depths) if depth >= layer]
        pending = [t - before for before, t in zip([-1, *reached], reached, strict=False)]
        pairs += sum(min(p, backlog + 1) for p in pending)
        filled += sum(max(p - backlog - 1, 0) for p in pending)
    assert (found.pairs, found.filled) == (pairs, filled)
