"""BLIP of transformers 5 as streams: ``vision``, ``encoder`` (of questions, where they are asked), ``decoder``."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import BlipForConditionalGeneration, BlipForQuestionAnswering

from lightning_mue.backbones.decoder import DecoderLayers, LayerCache
from lightning_mue.backbones.generating import GeneratingView
from lightning_mue.backbones.generation import read_settings
from lightning_mue.backbones.joint import encoder_call
from lightning_mue.backbones.pieces import LayerPieces, blip_pieces
from lightning_mue.backbones.stream import (
    DecodeSettings,
    EncoderStream,
    Inputs,
    LayerCall,
    Outputs,
    StreamState,
    additive_mask,
)
from lightning_mue.backbones.vit import ViTStream
from lightning_mue.prompt import IGNORE


class QuestionStream:
    """A ``BlipTextModel`` over the question; each layer reads the picture beside it.

    Args:
        encoder: the model.
    """

    name = "encoder"

    def __init__(self, encoder: Any) -> None:
        self._embeddings, self._layers = encoder.embeddings, encoder.encoder.layer
        self.num_layers, self.width = len(self._layers), encoder.config.hidden_size

    def prologue(self, inputs: Inputs, done: Outputs) -> StreamState:
        """Embeddings of the question's tokens."""
        ids_BT = inputs["input_ids"]
        if ids_BT.shape[1] > (most := self._embeddings.position_embeddings.num_embeddings):
            raise ValueError(
                f"The question has {ids_BT.shape[1]} tokens; the text encoder's `max_position_embeddings` is {most}."
            )
        h_BTD, valid = self._embeddings(ids_BT), inputs.get("attention_mask")
        valid_BT = None if valid is None else valid.bool()
        return StreamState(h_BTD, valid_BT, additive_mask(valid_BT, h_BTD.dtype), done["vision"])

    def call(self, k: int, state: StreamState) -> LayerCall:
        """One layer."""
        return encoder_call(_QuestionLayer(self._layers[k - 1]), state.h_BTD, state.beside_BSD, state.mask)

    def layer(self, k: int, state: StreamState) -> Tensor:
        """Run one layer."""
        return self._layers[k - 1](state.h_BTD, state.beside_BSD, state.mask)

    def epilogue(self, state: StreamState) -> Tensor:
        """Layers are post-norm: nothing is left to do."""
        return state.h_BTD


class BlipDecoderStream(DecoderLayers):
    """A ``BlipTextLMHeadModel``; the transform before its head stands where others have a final norm.

    Args:
        decoder: the model.

    Raises:
        TypeError: its layers have no cross-attention.
    """

    def __init__(self, decoder: Any) -> None:
        super().__init__(decoder.cls.predictions.transform, decoder.cls.predictions.decoder)
        self._embeddings, self._layers = decoder.bert.embeddings, decoder.bert.encoder.layer
        if not hasattr(self._layers[0], "crossattention"):
            raise TypeError("A BLIP without cross-attention reads no picture; its text config needs `is_decoder`.")
        attention = self._layers[0].attention.self
        self.num_layers, self.width = len(self._layers), decoder.config.hidden_size
        self.num_heads = self.num_kv_heads = attention.num_attention_heads
        self.head_dim = attention.attention_head_size
        self.memory_width = self._layers[0].crossattention.self.key.in_features
        self.max_positions = self._embeddings.position_embeddings.num_embeddings

    def embed_at(self, ids_BT: Tensor, positions_T: Tensor) -> Tensor:
        """Token and position embeddings and their norm."""
        return self._embeddings(ids_BT, position_ids=positions_T)

    def self_kv(self, k: int, h_BTD: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """K and V of layer ``k``'s self-attention."""
        own = self._layers[k - 1].attention.self
        return self._heads(own.key(h_BTD)), self._heads(own.value(h_BTD))

    def memory_kv(self, k: int, memory_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of layer ``k``'s cross-attention."""
        cross = self._layers[k - 1].crossattention.self
        return self._heads(cross.key(memory_BSD)), self._heads(cross.value(memory_BSD))

    def pieces(self, k: int) -> LayerPieces:
        """Layer ``k`` cut at its attentions."""
        return blip_pieces(self._layers[k - 1], self.num_heads)

    def _run(
        self,
        k: int,
        h_BTD: Tensor,
        memory_BSD: Tensor,
        self_mask: Tensor | None,
        memory_mask: Tensor | None,
        cache: LayerCache | None,
    ) -> Tensor:
        layer = self._layers[k - 1]
        if memory_mask is None:
            return layer(h_BTD, memory_BSD, self_mask, past_key_values=cache)
        # Its parts, in its order: transformers' layer loses the memory's mask on the way to its attention.
        h_BTD, _ = layer.attention(h_BTD, self_mask, past_key_values=cache)
        read_BTD, _ = layer.crossattention.self(h_BTD, None, memory_BSD, memory_mask, cache)
        return layer.feed_forward_chunk(layer.crossattention.output(read_BTD, h_BTD))


class BlipView(GeneratingView):
    """A BLIP that captions, or one that answers questions, seen as streams; owns no weights.

    Args:
        model: the model.

    Raises:
        TypeError: its decoder reads no picture.
    """

    contrastive = None

    def __init__(self, model: BlipForConditionalGeneration | BlipForQuestionAnswering) -> None:
        super().__init__(model)
        self._asked = isinstance(model, BlipForQuestionAnswering)
        vision = self.model.vision_model
        self.encoders: tuple[EncoderStream, ...] = (
            ViTStream(vision.embeddings, vision.encoder.layers, vision.post_layernorm),
        )
        if self._asked:
            self.encoders += (QuestionStream(self.model.text_encoder),)
            self.generate_inputs = ("input_ids", "pixel_values", "attention_mask", "decoder_prompt")
        self.decoder = BlipDecoderStream(self.model.text_decoder)

    @property
    def generator(self) -> Any:
        """The text decoder."""
        return self.model.text_decoder

    def answer_call(self, asked: Mapping[str, Any], memory_BSD: Tensor, valid_BS: Tensor | None) -> dict[str, Any]:
        """A text decoder's, which reads the memory beside its own tokens.

        Of a caption's prompt, ``input_ids``, transformers takes the first token for a start and the last for an end.
        """
        call, text = dict(asked), self.model.config.text_config
        ids_BT, valid_BT = call.pop("input_ids", None), call.pop("attention_mask", None)
        if ids_BT is not None:
            ids_BT = torch.as_tensor(ids_BT, device=memory_BSD.device)[:, :-1].clone()
            ids_BT[:, 0] = text.bos_token_id
        elif (ids_BT := call.pop("decoder_input_ids", None)) is None:
            ids_BT = torch.full((len(memory_BSD), 1), text.bos_token_id, device=memory_BSD.device)
        call |= {"input_ids": ids_BT, "encoder_hidden_states": memory_BSD}
        call |= {} if valid_BT is None else {"attention_mask": valid_BT[:, :-1]}
        call |= {} if valid_BS is None else {"encoder_attention_mask": valid_BS}
        return {"eos_token_id": text.sep_token_id, "pad_token_id": text.pad_token_id, **call}

    def memory(self, done: Outputs) -> Tensor:
        """The picture's tokens, or those of the question, which have read it."""
        return done[self.encoders[-1].name]

    def memory_mask(self, inputs: Inputs) -> Tensor | None:
        """The decoder must not read the question's padding."""
        valid = inputs.get("attention_mask") if self._asked else None
        return None if valid is None else additive_mask(valid.bool(), self.model.text_decoder.dtype)

    def decode_settings(self, max_new_tokens: int | None) -> DecodeSettings:
        """Read the decoder's generation config, as ``generate`` does; start, end and padding are the text config's."""
        config, text = copy.copy(self.model.text_decoder.generation_config), self.model.config.text_config
        config.decoder_start_token_id = text.bos_token_id
        config.eos_token_id, config.pad_token_id = text.sep_token_id, text.pad_token_id
        return read_settings(config, max_new_tokens)

    def read_call(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """BLIP moves labels itself: of its own call they hold the start token, and -100 for what is a prompt.

        Args:
            given: arguments by name.

        Raises:
            ValueError: labels are others than the tokens that the decoder is given.
        """
        ids = "decoder_input_ids" if self._asked else "input_ids"
        masks = "decoder_attention_mask" if self._asked else "attention_mask"
        if (labels_BT := given.get("labels")) is None:
            return given
        tokens_BT = labels_BT if given.get(ids) is None else given[ids]
        if tokens_BT.shape != labels_BT.shape or bool(((labels_BT != tokens_BT) & (labels_BT != IGNORE)).any()):
            raise ValueError(
                f"BLIP's `labels` must be the tokens of `{ids}`, some of them {IGNORE}; others were found."
            )
        prompt_BP, labels_BT = _without_start(tokens_BT, labels_BT)
        call = {name: value for name, value in given.items() if name not in (ids, masks)} | {"labels": labels_BT}
        return call | ({"decoder_prompt": prompt_BP} if prompt_BP.shape[1] else {})

    def _generate(self, **inputs_and_settings: Any) -> Tensor:
        """Transformers' own ``generate``; of a question the decoder's, which is given the mask and any prompt."""
        pixel_values, settings = inputs_and_settings.pop("pixel_values"), inputs_and_settings
        if not self._asked:
            if (ids_BT := settings.pop("decoder_input_ids", None)) is not None:
                settings["input_ids"] = nn.functional.pad(ids_BT, (0, 1))  # what it takes for an end, and leaves out
            return super()._generate(pixel_values=pixel_values, **settings)
        with torch.no_grad():
            image_BSD = self.model.vision_model(pixel_values).last_hidden_state
            question, valid = settings.pop("input_ids"), settings.pop("attention_mask", None)
            found = self.model.text_encoder(question, valid, encoder_hidden_states=image_BSD)
        with _masked(self.model.text_decoder, self.memory_mask({"attention_mask": valid})):
            ids: Tensor = self.generator.generate(**self.answer_call(settings, found.last_hidden_state, None))
        return ids


@contextmanager
def _masked(decoder: Any, mask_B11S: Tensor | None) -> Iterator[None]:
    """Give the decoder's cross-attentions their mask: transformers' layers lose it on the way."""

    def give(_: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        assert mask_B11S is not None
        beams = len(args[0]) // len(mask_B11S)
        return args, given | {"encoder_attention_mask": mask_B11S.repeat_interleave(beams, 0)}

    with ExitStack() as hooks:
        for layer in decoder.bert.encoder.layer if mask_B11S is not None else ():
            attention = layer.crossattention.self
            hooks.callback(attention.register_forward_pre_hook(give, with_kwargs=True).remove)
        yield


class _QuestionLayer(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, h_BTD: Tensor, beside_BSD: Tensor, mask: Tensor | None = None) -> Tensor:
        result_BTD: Tensor = self.layer(h_BTD, beside_BSD, mask)
        return result_BTD


def _without_start(tokens_BT: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's prompt, up to the first label that counts, and the labels from there, padded with -100."""
    tokens_BT, labels_BT = tokens_BT[:, 1:], labels_BT[:, 1:]
    counts_BT = labels_BT != IGNORE
    first_B = torch.where(counts_BT.any(1), counts_BT.long().argmax(1), 0).tolist()
    prompts = [row[:n] for row, n in zip(tokens_BT, first_B, strict=True)]
    answers = [row[n:] for row, n in zip(labels_BT, first_B, strict=True)]
    return pad_sequence(prompts, True, IGNORE), pad_sequence(answers, True, IGNORE)
