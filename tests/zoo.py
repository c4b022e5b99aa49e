"""Tiny random models of every backbone; a new backbone joins all invariants by one line in ``BACKBONES``."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mue.backbones import build_backbone
from lightning_mue.exits import ExitConfig, attach_exits

VOCABULARY = 97
IMAGE_TOKENS = 5
START, END, PAD = 2, 3, 0


def tiny_florence2(text_model: str = "bart") -> nn.Module:
    text = {
        "model_type": text_model,
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "encoder_layers": 4,
        "decoder_layers": 5,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_position_embeddings": 64,
        "pad_token_id": PAD,
        "bos_token_id": START,
        "eos_token_id": END,
        "decoder_start_token_id": START,
        "initializer_range": 0.3,
        "init_std": 0.3,
    }
    vision = {
        "depths": [1, 1, 4, 1],
        "embed_dim": [8, 16, 24, 32],
        "num_heads": [2, 2, 4, 4],
        "num_groups": [2, 2, 4, 4],
        "patch_size": [7, 3, 3, 3],
        "window_size": 3,
        "projection_dim": 32,
        "max_position_embeddings": 20,
        "initializer_range": 0.2,
    }
    generation = {"decoder_start_token_id": START, "eos_token_id": END, "pad_token_id": PAD, "max_new_tokens": 12}
    return build_backbone(
        {
            "model_type": "florence2",
            "image_token_id": 4,
            "text_config": text,
            "vision_config": vision,
            "generation_config": generation,
        }
    )


def prompted_inputs(batch: int, seed: int = 0, prompt: int = 6, image_tokens: int = 0) -> dict[str, Tensor]:
    """Pictures of 64 x 64 and prompts of random lengths, padded on the right."""
    g = torch.Generator().manual_seed(seed)
    length = image_tokens + prompt
    ids = torch.randint(5, VOCABULARY, (batch, length), generator=g)
    ids[:, :image_tokens] = 4
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        short = int(torch.randint(2, prompt + 1, (1,), generator=g))
        ids[row, image_tokens + short :] = PAD
        mask[row, image_tokens + short :] = 0
    pixels = torch.randn(batch, 3, 64, 64, generator=g)
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask}


florence2_inputs = partial(prompted_inputs, image_tokens=IMAGE_TOKENS)  # 4 + 1


def tiny_coca() -> nn.Module:
    """A unimodal half of 2 layers below a multimodal one of 4, and weights large enough to say different things."""
    model = build_backbone(
        {
            "model_type": "open_clip_coca",
            "embed_dim": 32,
            "vision_cfg": {
                "image_size": 64,
                "patch_size": 16,
                "width": 24,
                "layers": 4,
                "head_width": 6,
                "attn_pooler_queries": 6,
                "attn_pooler_heads": 4,
            },
            "text_cfg": {"context_length": 64, "vocab_size": VOCABULARY, "width": 32, "heads": 4, "layers": 2},
            "multimodal_cfg": {"context_length": 64, "width": 32, "heads": 4, "layers": 4},
            "generation_config": {
                "decoder_start_token_id": START,
                "eos_token_id": END,
                "pad_token_id": PAD,
                "suppress_tokens": [PAD],
                "max_new_tokens": 12,
                "use_cache": False,
            },
        }
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or "embedding" in name:
                std = 1.0 if "positional" in name else 0.2
                upper = "text_decoder" in name and name.endswith("proj.weight") and ".3." not in name
                parameter.copy_(torch.randn(parameter.shape) * std * (4 if upper else 1))
    return model


def tiny_captioner(encoder: dict[str, Any], decoder: dict[str, Any], **more: Any) -> nn.Module:
    """A ``VisionEncoderDecoderModel`` in which nothing that transformers begins at zero is zero."""
    ids = {"pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END, "decoder_start_token_id": START}
    drawn = {"initializer_range": 0.3, "init_std": 0.3}
    model = build_backbone(
        {
            "model_type": "vision-encoder-decoder",
            "encoder": {"image_size": 64, **drawn, **encoder},
            "decoder": {"vocab_size": VOCABULARY, "max_position_embeddings": 64, **ids, **drawn, **decoder},
            "pad_token_id": PAD,
            "decoder_start_token_id": START,
            "generation_config": ids | {"max_new_tokens": 12},
            **more,
        }
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("_token", "position_embeddings", "bias_table")):
                parameter.normal_(std=0.3)
    return model


VIT = {"patch_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
BART = {"d_model": 32, "decoder_layers": 5, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}


def tiny_trocr() -> nn.Module:
    """As the small TrOCR: the decoder's cross-attention reads a DeiT's width, and embeddings are scaled."""
    decoder = {"model_type": "trocr", **BART, "cross_attention_hidden_size": 24, "scale_embedding": True}
    return tiny_captioner({"model_type": "deit", **VIT, "hidden_size": 24}, decoder)


def tiny_vit_gpt2() -> nn.Module:
    """Encoder and decoder of one width."""
    shape = {"n_embd": 32, "n_layer": 5, "n_head": 4, "n_inner": 48, "n_positions": 64, "add_cross_attention": True}
    return tiny_captioner({"model_type": "vit", **VIT, "hidden_size": 32}, {"model_type": "gpt2", **shape})


def tiny_donut() -> nn.Module:
    """Windows are shifted in every second block of the long stage; the memory is projected to the decoder's width."""
    swin = {"patch_size": 4, "embed_dim": 12, "depths": [1, 4, 1], "num_heads": [2, 4, 4], "window_size": 4}
    still = {"drop_path_rate": 0.0, "initializer_range": 0.05}  # no norm ends the tower
    decoder = {"model_type": "mbart", **BART}
    return tiny_captioner({"model_type": "donut-swin", **swin, **still}, decoder, position_std=1.0)


def tiny_blip(architecture: str = "BlipForConditionalGeneration") -> nn.Module:
    """Its decoder's end is the separator, not the end token; what layers add must not drown the tokens."""
    ids = {"bos_token_id": START, "sep_token_id": END, "eos_token_id": 1, "pad_token_id": PAD}
    shape = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "initializer_range": 0.3}
    text = {"vocab_size": VOCABULARY, "num_hidden_layers": 5, "max_position_embeddings": 64}
    model: Any = build_backbone(
        {
            "model_type": "blip",
            "architectures": [architecture],
            "vision_config": {**shape, "image_size": 64, "patch_size": 16, "num_hidden_layers": 4},
            "text_config": {**shape, **ids, **text},
            "generation_config": {"max_new_tokens": 12},
            "position_std": 1.0,
        }
    )
    with torch.no_grad():
        for layer in model.text_decoder.bert.encoder.layer:
            for part in (layer.attention, layer.crossattention, layer):
                part.output.dense.weight *= 0.15
    return model


def picture_inputs(batch: int, seed: int = 0, prompt: int = 0) -> dict[str, Tensor]:
    """Pictures alone: an encoder that reads prompts there is none."""
    del prompt
    return {"pixel_values": torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(seed))}


T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 6,
    "d_ff": 48,
    "num_layers": 5,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0,
    "pad_token_id": PAD,
    "eos_token_id": END,
    "decoder_start_token_id": START,
}
"""Heads are not the width together, and answers outgrow the distances that a bias tells apart. (transformers' own
``generate`` makes its cache as long as the encoder, so the decoder is no deeper.)"""


def tiny_t5() -> nn.Module:
    """A head that is the embedding, and so scaled."""
    ids = {"decoder_start_token_id": START, "eos_token_id": END, "pad_token_id": PAD}
    return talkative(build_backbone({"model_type": "t5", **T5, "generation_config": ids | {"max_new_tokens": 12}}))


@torch.no_grad()
def talkative(model: Any) -> nn.Module:
    """Let a T5's layers and biases say more than its embeddings, or it repeats the last token."""
    for name, parameter in model.named_parameters():
        if "relative_attention_bias" in name:
            parameter.mul_(8)
        elif parameter.ndim > 1:
            parameter.mul_(0.6 if name.startswith("shared") else 1.5)
    model.decoder.final_layer_norm.weight.mul_(3)  # and be sure of some tokens, but seldom of the end
    model.shared.weight[END] *= 0.7
    return model


def text_inputs(batch: int, seed: int = 0, prompt: int = 16) -> dict[str, Tensor]:
    """Prompts of random lengths, padded on the right."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (batch, prompt), generator=g)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        short = int(torch.randint(2, prompt + 1, (1,), generator=g))
        ids[row, short:], mask[row, short:] = PAD, 0
    return {"input_ids": ids, "attention_mask": mask}


def tiny_udop() -> nn.Module:
    """Pages of 4 x 4 patches."""
    ids = {"decoder_start_token_id": START, "eos_token_id": END, "pad_token_id": PAD}
    page: dict[str, Any] = {"image_size": 64, "patch_size": 16, "max_2d_position_embeddings": 50}
    line = {"type": "1d", "relative_attention_num_buckets": 8, "max_distance": 12}  # its weights are the first block's
    page["relative_bias_args"] = [line, {"type": "horizontal"}, {"type": "vertical"}]
    config = {"model_type": "udop", **T5, **page, "generation_config": ids | {"max_new_tokens": 12}}
    return talkative(build_backbone(config))


def page_inputs(batch: int, seed: int = 0, prompt: int = 10) -> dict[str, Tensor]:
    """Words at random places, of which the first, a special token, has none; and pages."""
    g, words = torch.Generator().manual_seed(seed), text_inputs(batch, seed, prompt)
    corner, size = torch.rand(batch, prompt, 2, generator=g) * 0.8, torch.rand(batch, prompt, 2, generator=g) * 0.2
    boxes = torch.cat([corner, corner + size], -1) * words["attention_mask"][..., None]
    boxes[:, 0] = 0
    return words | {"bbox": boxes, "pixel_values": torch.randn(batch, 3, 64, 64, generator=g)}


def tiny_blip2() -> nn.Module:
    """The Q-Former's second layer reads no picture; what transformers begins at zero, the queries, is not zero."""
    ids = {"decoder_start_token_id": START, "eos_token_id": END, "pad_token_id": PAD}
    shape = {"num_attention_heads": 4, "intermediate_size": 48, "initializer_range": 0.3}
    sizes = {"hidden_size": 24, "image_size": 64, "patch_size": 16, "num_hidden_layers": 4}
    model: Any = build_backbone(
        {
            "model_type": "blip-2",
            "vision_config": {**shape, **sizes},
            "qformer_config": {**shape, "hidden_size": 28, "num_hidden_layers": 2, "vocab_size": 5},
            "text_config": {"model_type": "t5", **T5, "vocab_size": VOCABULARY},
            "num_query_tokens": IMAGE_TOKENS,
            "image_token_index": 4,
            "initializer_range": 0.3,
            "generation_config": ids | {"max_new_tokens": 12},
        }
    )
    nn.init.normal_(model.query_tokens)
    talkative(model.language_model)
    return model


def tiny_t5gemma2() -> nn.Module:
    """Windows shorter than prompts and answers, queries that share keys, and angles that differ by kind of layer.

    Heads of 16, as ONNX Runtime takes 16 cosines at a time, and what is left over otherwise, to the last bit.
    """
    ids = {"bos_token_id": START, "eos_token_id": END, "pad_token_id": PAD}
    drawn = {"initializer_range": 0.3}
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    turns = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 50.0, "factor": 2.0},
    }
    stack = {**shape, **ids, **drawn, "vocab_size": VOCABULARY, "head_dim": 16, "query_pre_attn_scalar": 12}
    stack |= {"sliding_window": 5, "max_position_embeddings": 64, "rope_parameters": turns}
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    vision = {"model_type": "siglip_vision_model", "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 4}
    vision |= {"num_attention_heads": 4, "image_size": 64, "patch_size": 16, "vision_use_head": True}
    text = {**stack, "num_hidden_layers": 4, "layer_types": kinds[1:]}
    model: Any = build_backbone(
        {
            "model_type": "t5gemma2",
            "encoder": {"text_config": text, "vision_config": vision, "mm_tokens_per_image": 4, "eoi_token_index": 5},
            "decoder": {**stack, "num_hidden_layers": 5, "layer_types": kinds},
            "image_token_index": 4,
            "generation_config": ids | {"decoder_start_token_id": START, "max_new_tokens": 12},
            **drawn,
        }
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_tokens" in name:
                parameter.normal_(std=0.05)  # what layers add must not drown in it, or a token repeats
            elif "multi_modal" in name or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
        model.model.decoder.norm.weight.add_(7)
    return model


BACKBONES: dict[str, tuple[Callable[[], nn.Module], Callable[..., dict[str, Tensor]], dict[str, Any]]] = {
    "florence2": (
        tiny_florence2,
        florence2_inputs,
        {"vision": [1, 2, 3], "encoder": [1, 2, 3], "decoder": [1, 2, 3, 4]},
    ),
    "florence2_prenorm": (
        partial(tiny_florence2, "mbart"),
        florence2_inputs,
        {"vision": [1, 3], "encoder": [1, 3], "decoder": [1, 2, 4]},
    ),
    "florence2_decomposed": (
        partial(tiny_florence2, "mbart"),
        florence2_inputs,
        {"vision": [1, 3], "image": [1, 2, 3], "text": [1, 3], "decoder": [1, 2, 4]},
    ),
    "florence2_one_way": (
        tiny_florence2,
        florence2_inputs,
        {"vision": [1, 3], "image": [1, 3], "text": [1, 2, 3], "decoder": [1, 2, 4], "text_reads_image": True},
    ),
    "coca": (tiny_coca, picture_inputs, {"vision": [1, 2, 3], "text": [1], "decoder": [3, 4, 5]}),
    "trocr": (tiny_trocr, picture_inputs, {"vision": [1, 3], "decoder": [1, 2, 4]}),
    "vit_gpt2": (tiny_vit_gpt2, picture_inputs, {"vision": [1, 3], "decoder": [2, 3, 4]}),
    "donut": (tiny_donut, picture_inputs, {"vision": [1, 3], "decoder": [2, 3, 4]}),
    "blip": (tiny_blip, picture_inputs, {"vision": [1, 3], "decoder": [1, 2, 4]}),
    "blip_vqa": (
        partial(tiny_blip, "BlipForQuestionAnswering"),
        prompted_inputs,
        {"vision": [1, 3], "encoder": [1, 2, 3], "decoder": [1, 2, 4]},
    ),
    "t5": (tiny_t5, text_inputs, {"encoder": [1, 3], "decoder": [1, 2, 4]}),
    "udop": (tiny_udop, page_inputs, {"encoder": [1, 3], "decoder": [1, 2, 4]}),
    "blip2": (tiny_blip2, florence2_inputs, {"vision": [1, 3], "encoder": [1, 3], "decoder": [1, 2, 4]}),
    "t5gemma2": (
        tiny_t5gemma2,
        partial(prompted_inputs, image_tokens=4),
        {"vision": [1, 3], "encoder": [1, 3], "decoder": [1, 2, 4]},
    ),
}
"""Name -> model, inputs, and what its ``ExitConfig`` says."""


def make(name: str, seed: int = 0, exits: bool = True) -> nn.Module:
    """Return a tiny model in eval mode, with exits whose adapters and gates are not zero (or none)."""
    torch.manual_seed(seed)
    model = BACKBONES[name][0]()
    if exits:
        attached = attach_exits(model, exit_config(name))
        with torch.no_grad():
            for parameter in attached.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


@cache
def shared(name: str, seed: int = 0) -> nn.Module:
    """Return the same model every time, without gradients, for tests that leave it as it was."""
    return make(name, seed).requires_grad_(False)


def inputs(name: str, batch: int, seed: int = 0) -> dict[str, Tensor]:
    return BACKBONES[name][1](batch, seed)


def reads_prompts(name: str) -> bool:
    """Whether an encoder reads a prompt."""
    return "input_ids" in inputs(name, 1)


def image_tokens(name: str) -> int:
    """Return how many of a prompt's tokens stand for the picture."""
    if name == "t5gemma2":
        return 4  # pooled to a square
    return IMAGE_TOKENS if name.startswith(("florence2", "blip2")) else 0


def has_vision(name: str) -> bool:
    """Whether a stream is of the picture alone."""
    return "vision" in exit_layers(name)


def alone(tensors: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """Return one row without its padding; with it, where patches follow the words: their distance is of the model."""
    one = {k: v[row : row + 1] for k, v in tensors.items()}
    if "attention_mask" not in one or "bbox" in one:
        return one
    keep = one["attention_mask"][0].bool()
    return one | {k: one[k][:, keep] for k in ("input_ids", "attention_mask")}


def exit_config(name: str) -> ExitConfig:
    return ExitConfig(**BACKBONES[name][2], adapter_width=8, gate_width=8)


def exit_layers(name: str) -> dict[str, tuple[int, ...]]:
    """Return stream -> exits, of the streams that an answer passes: CoCa's texts are embedded alone."""
    layers = exit_config(name).layers()
    return {stream: ks for stream, ks in layers.items() if (name, stream) != ("coca", "text")}
