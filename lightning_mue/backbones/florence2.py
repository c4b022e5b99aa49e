"""Florence-2 of transformers 5 as streams: ``vision``, ``encoder`` (or ``image`` and ``text``), ``decoder``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Florence2ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from lightning_mue.backbones.bart import BartDecoderStream
from lightning_mue.backbones.generating import GeneratingView
from lightning_mue.backbones.joint import JointEncoderStream
from lightning_mue.backbones.modality import modality_order, modality_streams
from lightning_mue.backbones.stream import (
    EncoderKind,
    EncoderStream,
    Inputs,
    LayerCall,
    Outputs,
    StreamState,
    additive_mask,
)


class DaViTStream:
    """The longest DaViT stage; earlier stages are the prologue, later stages and the projector the epilogue.

    States are kept as ``[B, T, D]`` (``T`` = height * width) though DaViT's blocks take pictures: the two are views of
    each other.
    """

    name = "vision"

    def __init__(self, model: Florence2ForConditionalGeneration) -> None:
        self._tower: Any = model.model.vision_tower
        self._projector = model.model.multi_modal_projector
        depths = [len(stage) for stage in self._tower.blocks]
        self._stage = depths.index(max(depths))
        self.num_layers = max(depths)
        self.width = self._tower.embed_dim[self._stage]

    def prologue(self, inputs: Inputs, done: Outputs) -> StreamState:
        """Run the stages before the long one and its patch embedding."""
        h_BCHW = inputs["pixel_values"].to(self._tower.convs[0].conv.weight.dtype)
        for conv, stage in zip(self._tower.convs[: self._stage], self._tower.blocks, strict=False):
            h_BCHW = conv(h_BCHW)
            for block in stage:
                h_BCHW = block(h_BCHW)
        h_BCHW = self._tower.convs[self._stage](h_BCHW)
        return StreamState(h_BCHW.flatten(2).transpose(1, 2), grid=(h_BCHW.shape[2], h_BCHW.shape[3]))

    def call(self, k: int, state: StreamState) -> LayerCall:
        """One spatial + channel block; its windows fix the picture's size."""
        assert state.grid is not None
        return LayerCall(_Block(self._tower.blocks[self._stage][k - 1], *state.grid), (state.h_BTD,), ((0,),))

    def layer(self, k: int, state: StreamState) -> Tensor:
        """Run one block."""
        assert state.grid is not None
        h_BCHW = self._tower.blocks[self._stage][k - 1](_to_picture(state.h_BTD, *state.grid))
        return h_BCHW.flatten(2).transpose(1, 2)

    def epilogue(self, state: StreamState) -> Tensor:
        """Run the later stages and the projector: image features ``[B, image tokens, text width]``."""
        assert state.grid is not None
        h_BCHW = _to_picture(state.h_BTD, *state.grid)
        for i in range(self._stage + 1, self._tower.num_stages):
            h_BCHW = self._tower.convs[i](h_BCHW)
            for block in self._tower.blocks[i]:
                h_BCHW = block(h_BCHW)
        return self._projector(h_BCHW)


class Florence2View(GeneratingView):
    """``Florence2ForConditionalGeneration`` seen as streams; owns no weights.

    Args:
        model: the model.
        encoder: how image and text meet in the encoder.
    """

    generate_inputs = ("input_ids", "pixel_values", "attention_mask", "decoder_prompt")
    contrastive = None

    def __init__(self, model: Florence2ForConditionalGeneration, encoder: EncoderKind = "joint") -> None:
        super().__init__(model)
        self._kind = encoder
        text: tuple[EncoderStream, ...] = (JointEncoderStream(model.model),)
        if encoder != "joint":
            text = modality_streams(model.model, encoder)
        self.encoders: tuple[EncoderStream, ...] = (DaViTStream(model), *text)
        self.decoder = BartDecoderStream(model.model.language_model.decoder, model.lm_head)

    def _generate(self, **inputs_and_settings: Any) -> Tensor:
        """Transformers' own ``generate``; of the decomposed encoder's memory where there is one."""
        given = {k: v for k, v in inputs_and_settings.items() if k in self.generate_inputs}
        settings = {k: v for k, v in inputs_and_settings.items() if k not in given}
        if self._kind == "joint":
            return super()._generate(**given, **settings)
        done: dict[str, Tensor] = {}
        for stream in self.encoders:
            state = stream.prologue(given, done)
            for k in range(1, stream.num_layers + 1):
                state.h_BTD = stream.layer(k, state)
            done[stream.name] = stream.epilogue(state)
        memory_BSD, hidden = self.memory(done), self.memory_mask(given)
        shape = memory_BSD.shape[:2]
        valid_BS = memory_BSD.new_ones(shape, dtype=torch.long) if hidden is None else (hidden[:, 0, 0] == 0).long()
        encoder_outputs = BaseModelOutput(last_hidden_state=memory_BSD)
        return super()._generate(encoder_outputs=encoder_outputs, attention_mask=valid_BS, **settings)

    def memory(self, done: Outputs) -> Tensor:
        """The encoder's states, or those of both modalities."""
        return done["encoder"] if self._kind == "joint" else torch.cat([done["image"], done["text"]], 1)

    def memory_mask(self, inputs: Inputs) -> Tensor | None:
        """The decoder must not read the prompt's padding."""
        valid = inputs.get("attention_mask")
        if valid is None:
            return None
        if self._kind != "joint":
            valid = valid.gather(1, modality_order(inputs, self.model.config.image_token_id))
        return additive_mask(valid.bool(), self.model.lm_head.weight.dtype)


class _Block(nn.Module):
    def __init__(self, block: nn.Module, height: int, width: int) -> None:
        super().__init__()
        self.block, self.height, self.width = block, height, width

    def forward(self, h_BTD: Tensor) -> Tensor:
        h_BCHW: Tensor = self.block(_to_picture(h_BTD, self.height, self.width))
        return h_BCHW.flatten(2).transpose(1, 2)


def _to_picture(h_BTD: Tensor, height: int, width: int) -> Tensor:
    return h_BTD.transpose(1, 2).unflatten(2, (height, width))
