"""What the engine is compared with: transformers' own modules, ``forward`` and ``generate``; ours are only adapters.

Shapes: ``B`` batch, ``S`` tokens of the joint sequence (image and text), ``D`` width.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    Blip2ForConditionalGeneration,
    BlipForConditionalGeneration,
    BlipForQuestionAnswering,
    T5ForConditionalGeneration,
    T5Gemma2ForConditionalGeneration,
    UdopForConditionalGeneration,
    VisionEncoderDecoderModel,
)
from transformers.modeling_outputs import BaseModelOutput

from lightning_mue.exits import attached

T5_FAMILY = (T5ForConditionalGeneration, UdopForConditionalGeneration)


def encoder_kind(model: nn.Module) -> str:
    """Return how the model's exits want image and text to meet; without exits, jointly."""
    exits = attached(model)
    return "joint" if exits is None or hasattr(model, "coca") else exits.config.encoder_kind


def inputs(model: Any, tensors: Mapping[str, Tensor], depths: Mapping[str, int] | None = None) -> dict[str, Any]:
    """Return what the model's own ``forward`` and ``generate`` must be given to compute what its exits' view does.

    That is ``tensors`` with a joint encoder; with another, the memory that the model's own encoder gives under masks.
    ``depths`` leaves ``image`` or ``text`` early.
    """
    if encoder_kind(model) == "joint":
        return dict(tensors)
    memory_BSD = masked_memory(model, tensors, depths or {})
    return {"encoder_outputs": BaseModelOutput(memory_BSD), "attention_mask": tensors["attention_mask"]}


@torch.no_grad()
def masked_memory(model: Any, tensors: Mapping[str, Tensor], depths: Mapping[str, int]) -> Tensor:
    """Return the encoder's states ``[B, S, D]`` under a block-diagonal mask, in the order of the joint sequence.

    At full depth image and text come from one and the same joint pass. With text that reads the image, a second pass
    has no blocks, but image tokens hold the image's memory before every layer.
    """
    is_image_BS = tensors["input_ids"] == model.config.image_token_id
    valid_BSS = tensors["attention_mask"].bool()[:, None, :].expand(-1, is_image_BS.shape[1], -1)
    blocks_BSS = valid_BSS & (is_image_BS[:, :, None] == is_image_BS[:, None, :])
    image_BSD = _joint_pass(model, tensors, blocks_BSS, "image", depths)
    if encoder_kind(model) == "decomposed":
        text_BSD = _joint_pass(model, tensors, blocks_BSS, "text", depths)
    else:
        text_BSD = _joint_pass(model, tensors, valid_BSS, "text", depths, image_BSD)
    return torch.where(is_image_BS[..., None], image_BSD, text_BSD)


def _joint_pass(
    model: Any,
    tensors: Mapping[str, Tensor],
    may_BSS: Tensor,
    stream: str,
    depths: Mapping[str, int],
    image_BSD: Tensor | None = None,
) -> Tensor:
    """Run the model's own encoder over all tokens under a 4-D mask, left by all of them where ``stream`` is."""
    encoder = model.model.language_model.encoder
    is_image_BS1 = (tensors["input_ids"] == model.config.image_token_id)[..., None]
    features = model.get_image_features(tensors["pixel_values"]).pooler_output
    embeds_BSD = model.get_input_embeddings()(tensors["input_ids"]).masked_scatter(is_image_BS1, features)
    mask = torch.zeros(may_BSS.shape, device=may_BSS.device).masked_fill(~may_BSS, torch.finfo(torch.float32).min)

    def keep_image(_layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (torch.where(is_image_BS1, image_BSD, args[0]), *args[1:])

    with ExitStack() as stack:
        stack.enter_context(left_after(model, stream, depths.get(stream, len(encoder.layers))))
        for layer in encoder.layers if image_BSD is not None else ():
            stack.callback(layer.register_forward_pre_hook(keep_image).remove)
        return encoder(inputs_embeds=embeds_BSD, attention_mask=mask[:, None]).last_hidden_state


@contextmanager
def left_after(model: Any, stream: str, depth: int):
    """Cut the layers above ``depth`` off a stream, put the exit's adapter at the end; give the layers back after."""
    if (coca := getattr(model, "coca", None)) is not None:
        with _coca_left_after(model, coca, stream, depth):
            yield
        return
    owner, name = layers_at(model, stream)
    exits, layers = attached(model), getattr(owner, name)

    def adapt(_layer: nn.Module, _args: Any, output: Any) -> Any:
        h, *beside = output if isinstance(output, tuple) else (output,)
        if h.ndim == 3:
            h = exits.adapt(stream, depth, h)
        else:
            h = exits.adapt(stream, depth, h.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(h.shape)
        return (h, *beside) if isinstance(output, tuple) else h

    hook = layers[depth - 1].register_forward_hook(adapt)
    setattr(owner, name, layers[:depth])
    try:
        yield
    finally:
        hook.remove()
        setattr(owner, name, layers)


def decoder(model: Any) -> Any:
    """Return the module of transformers that holds the decoder's layers."""
    if is_blip(model):
        return model.text_decoder.bert.encoder
    if is_t5(model):
        return t5_of(model).decoder
    if isinstance(model, T5Gemma2ForConditionalGeneration):
        return model.model.decoder
    if not isinstance(model, VisionEncoderDecoderModel):
        return model.model.language_model.decoder
    return model.decoder.transformer if hasattr(model.decoder, "transformer") else model.decoder.model.decoder


def layers_at(model: Any, stream: str) -> tuple[nn.Module, str]:
    """Return what holds a stream's layers, and under which name."""
    if is_t5(model) and stream != "vision":
        return getattr(t5_of(model), stream), "block"
    if stream == "decoder":
        return decoder(model), next(name for name in ("h", "layer", "layers") if hasattr(decoder(model), name))
    if is_blip(model):
        return (model.vision_model.encoder, "layers") if stream == "vision" else (model.text_encoder.encoder, "layer")
    if isinstance(model, VisionEncoderDecoderModel):
        swin = getattr(model.encoder, "encoder", None)
        return (model.encoder, "layers") if swin is None else (swin.layers[1], "blocks")  # the second is the long one
    if isinstance(model, Blip2ForConditionalGeneration):
        return model.vision_model.encoder, "layers"
    if isinstance(model, T5Gemma2ForConditionalGeneration):
        encoder = model.model.encoder
        return (encoder.vision_tower.encoder if stream == "vision" else encoder.text_model), "layers"
    if stream == "vision":
        return model.model.vision_tower.blocks, "2"  # the third stage is the long one
    return model.model.language_model.encoder, "layers"


@torch.no_grad()
def memory(model: Any, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return what the decoder's cross-attention reads, ``[B, S, D]``."""
    if is_blip(model):
        return _blip_memory(model, tensors)
    start = torch.zeros(len(next(iter(tensors.values()))), 1, dtype=torch.long)
    out = model(**inputs(model, tensors), decoder_input_ids=start)
    found = getattr(out, "language_model_outputs", out).encoder_last_hidden_state  # of BLIP-2 there are two
    return model.enc_to_dec_proj(found) if hasattr(model, "enc_to_dec_proj") else found


@contextmanager
def _coca_left_after(model: Any, coca: Any, stream: str, depth: int):
    """The same for open_clip's towers; of the decoder all of the unimodal half stays."""
    stacks = [(coca.visual.transformer, "resblocks")]
    if stream == "decoder":
        depth -= len(coca.text.transformer.resblocks)
        stacks = [(coca.text_decoder, "resblocks"), (coca.text_decoder, "cross_attn")]
    whole = [getattr(*stack) for stack in stacks]
    at = depth + (len(coca.text.transformer.resblocks) if stream == "decoder" else 0)
    hook = whole[-1][depth - 1].register_forward_hook(lambda _l, _a, h_BTD: attached(model).adapt(stream, at, h_BTD))
    for (owner, name), layers in zip(stacks, whole, strict=True):
        setattr(owner, name, layers[:depth])
    try:
        yield
    finally:
        hook.remove()
        for (owner, name), layers in zip(stacks, whole, strict=True):
            setattr(owner, name, layers)


def generate(
    model: Any, tensors: Mapping[str, Tensor], depths: Mapping[str, int] | None = None, **settings: Any
) -> Tensor:
    """Return the model's own ``generate``, greedy if nothing else is asked; ``depths`` as in ``inputs``."""
    how = {"num_beams": 1, "do_sample": False} | settings
    return (_blip_generate if is_blip(model) else _generate)(model, inputs(model, tensors, depths), **how)


def _generate(model: Any, given: Mapping[str, Any], **settings: Any) -> Tensor:
    return model.generate(**given, **settings)


def truncated_generate(model: Any, tensors: Mapping[str, Tensor], stream: str, depth: int, **settings: Any) -> Tensor:
    """Return what ``generate`` gives when ``stream`` ends after ``depth`` layers and its adapter."""
    if stream in ("image", "text"):
        return generate(model, tensors, {stream: depth}, **settings)
    with left_after(model, stream, depth):
        return generate(model, tensors, **settings)


def decoder_states(model: Any, tensors: Mapping[str, Tensor], ids_BT: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return the decoder's states after layers 0 (embedding) to the last, each ``[B, T, D]``, and the logits.

    Where a final norm follows the last layer, the last states are those after it.
    """
    if (coca := getattr(model, "coca", None)) is not None:
        return _coca_states(model, coca, tensors, ids_BT)
    with torch.no_grad():
        out = forward(model, inputs(model, tensors), ids_BT, output_hidden_states=True)
        if is_blip(model):
            return [*out.hidden_states[:-1], final_norm(model)(out.hidden_states[-1])], out.logits
    states = list(getattr(out, "language_model_outputs", out).decoder_hidden_states)
    if is_t5(model):
        states[-1] = states[-1] * t5_of(model).config.d_model ** -0.5  # as the head reads it
    return states, out.logits


def forward(model: Any, given: Mapping[str, Any], ids_BT: Tensor, **settings: Any) -> Any:
    """Return what the model's own ``forward`` says of decoder tokens; of BLIP, whose output says less, its decoder's.

    Questions are asked alone, for the decoder would read their padding whatever the mask.
    """
    if not is_blip(model):
        return model(**given, decoder_input_ids=ids_BT, **settings)
    if not isinstance(model, BlipForQuestionAnswering):
        return model.text_decoder(ids_BT, encoder_hidden_states=_blip_memory(model, given), **settings)
    alone = [
        model.text_decoder(ids_BT[[row]], encoder_hidden_states=_blip_memory(model, one), **settings)
        for row, one in enumerate(_questions(given))
    ]
    states = zip(*(out.hidden_states for out in alone), strict=True) if settings else ()
    return SimpleNamespace(logits=torch.cat([out.logits for out in alone]), hidden_states=[*map(torch.cat, states)])


def _questions(given: Mapping[str, Any]) -> list[dict[str, Tensor]]:
    """Return each row without the padding of its question."""
    pixels, ids = given["pixel_values"], given["input_ids"]
    valid = given.get("attention_mask", torch.ones_like(ids)).bool()
    return [{"pixel_values": pixels[[row]], "input_ids": ids[[row]][:, valid[row]]} for row in range(len(ids))]


def t5_of(model: Any) -> Any:
    """Return BLIP-2's language model; another model itself."""
    return model.language_model if isinstance(model, Blip2ForConditionalGeneration) else model


def is_t5(model: nn.Module) -> bool:
    """Return whether what answers is a T5 or a UDOP."""
    return isinstance(t5_of(model), T5_FAMILY)


def is_blip(model: nn.Module) -> bool:
    """Return whether it captions or answers questions as BLIP does."""
    return isinstance(model, (BlipForConditionalGeneration, BlipForQuestionAnswering))


def _blip_memory(model: Any, given: Mapping[str, Any]) -> Tensor:
    """Return the picture's states, or the question's."""
    image_BSD = model.vision_model(given["pixel_values"]).last_hidden_state
    if not isinstance(model, BlipForQuestionAnswering):
        return image_BSD
    return model.text_encoder(given["input_ids"], encoder_hidden_states=image_BSD).last_hidden_state


def _blip_generate(
    model: Any, given: Mapping[str, Any], decoder_input_ids: Tensor | None = None, **settings: Any
) -> Tensor:
    """Of a caption the prompt is ``input_ids`` but the last; questions are asked alone, for padding would be read."""
    text = model.config.text_config
    if not isinstance(model, BlipForQuestionAnswering):
        if decoder_input_ids is not None:
            end_B1 = torch.full_like(decoder_input_ids[:, :1], text.sep_token_id)
            settings["input_ids"] = torch.cat([decoder_input_ids, end_B1], 1)
        return model.generate(given["pixel_values"], **settings)
    allowed, answers = settings.pop("prefix_allowed_tokens_fn", None), []
    for row, one in enumerate(_questions(given)):
        if allowed is not None:
            settings["prefix_allowed_tokens_fn"] = lambda _, ids, row=row: allowed(row, ids)
        if decoder_input_ids is None:
            answers.append(model.generate(**one, **settings)[0])
            continue
        ids = {"eos_token_id": text.sep_token_id, "pad_token_id": text.pad_token_id}
        read = {"input_ids": decoder_input_ids[[row]], "encoder_hidden_states": memory(model, one)}
        answers.append(model.text_decoder.generate(**read, **ids, **settings)[0])
    return pad_sequence(answers, batch_first=True, padding_value=text.pad_token_id)


@torch.no_grad()
def _coca_states(model: Any, coca: Any, tensors: Mapping[str, Tensor], ids_BT: Tensor) -> tuple[list[Tensor], Tensor]:
    """Listen at open_clip's blocks during its own forward; its [CLS], which comes last, is not of the decoder."""
    states, length = [], ids_BT.shape[1]
    with ExitStack() as stack:
        first = coca.text.transformer
        stack.callback(first.register_forward_pre_hook(lambda _l, args: states.append(args[0])).remove)
        for block in (*first.resblocks, *coca.text_decoder.cross_attn):
            stack.callback(block.register_forward_hook(lambda _l, _a, h_BTD: states.append(h_BTD)).remove)
        stack.callback(coca.text_decoder.ln_final.register_forward_hook(lambda _l, _a, h: states.append(h)).remove)
        logits_BTV = coca(tensors["pixel_values"], ids_BT, output_labels=False)["logits"]
    *states, _, normed = [h_BTD[:, :length] for h_BTD in states]
    return [*states, normed], logits_BTV


def suppressed(model: Any, logits: Tensor) -> Tensor:
    """Return logits, or their logarithms, without the tokens that may never be chosen."""
    barred = torch.zeros(logits.shape[-1], dtype=torch.bool)
    barred[model.generation_config.suppress_tokens or []] = True
    return logits.masked_fill(barred, -torch.inf)


def final_norm(model: Any) -> nn.Module:
    """Return what the decoder applies after its last layer: mBART's or GPT-2's norm, nothing for BART and TrOCR.

    BLIP has a transform there.
    """
    if is_blip(model):
        return model.text_decoder.cls.predictions.transform
    if (coca := getattr(model, "coca", None)) is not None:
        return coca.text_decoder.ln_final
    if is_t5(model):
        return Scaled(decoder(model).final_layer_norm, t5_of(model).config.d_model ** -0.5)
    norms = [getattr(decoder(model), name, None) for name in ("layer_norm", "ln_f", "norm")]
    return next((norm for norm in norms if norm is not None), nn.Identity())


def head(model: Any) -> nn.Module:
    """Return the vocabulary head of a model of transformers."""
    return (model.text_decoder if is_blip(model) else model).get_output_embeddings()


class Scaled(nn.Module):
    """A norm before a head that is the embedding."""

    def __init__(self, norm: nn.Module, scale: float) -> None:
        super().__init__()
        self.norm, self.scale = norm, scale

    def forward(self, h: Tensor) -> Tensor:
        return self.norm(h) * self.scale


def exit_logits(model: Any, layer: int, h_BTD: Tensor) -> Tensor:
    """Return the logits of the decoder exit after ``layer``: adapter, the backbone's final norm if any, its head."""
    with torch.no_grad():
        normed = final_norm(model)(attached(model).adapters[f"decoder_{layer}"](h_BTD))
        if (coca := getattr(model, "coca", None)) is None:
            return head(model)(normed)
        return normed @ coca.text_decoder.text_projection
