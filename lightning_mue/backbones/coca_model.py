"""open_clip's CoCa as a transformers model: config, folders, loss and ``generate`` in the usual form.

The shell computes nothing itself. Its ``generate`` is transformers', over the CoCa's own forward without a cache: what
upstream's was meant to be, which fails under transformers 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from open_clip.coca_model import CoCa
from open_clip.transformer import MultimodalTransformer, TextTransformer, VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from lightning_mue.prompt import IGNORE

_EPS = 1e-5
"""Of open_clip's norms, if nothing else is asked for."""


class CoCaConfig(PreTrainedConfig):
    """What ``open_clip.coca_model.CoCa`` is built from, under open_clip's own names.

    Args:
        embed_dim: of the embeddings, and width of the image tokens that the decoder reads.
        vision_cfg: as in open_clip's model configs.
        text_cfg: of the unimodal half.
        multimodal_cfg: of the multimodal half.
        quick_gelu: the activation of OpenAI's weights.
        **more: transformers' own, such as ``pad_token_id``.
    """

    model_type = "open_clip_coca"
    is_encoder_decoder = True

    def __init__(
        self,
        embed_dim: int = 512,
        vision_cfg: Mapping[str, Any] | None = None,
        text_cfg: Mapping[str, Any] | None = None,
        multimodal_cfg: Mapping[str, Any] | None = None,
        quick_gelu: bool = False,
        **more: Any,
    ) -> None:
        self.embed_dim, self.quick_gelu = embed_dim, quick_gelu
        self.vision_cfg = {"output_tokens": True, "attentional_pool": True} | dict(vision_cfg or {})
        self.text_cfg = {"output_tokens": True, "embed_cls": True} | dict(text_cfg or {})
        self.multimodal_cfg = dict(multimodal_cfg or {})
        super().__init__(**({"is_encoder_decoder": True, "tie_word_embeddings": False} | more))

    @property
    def coca(self) -> dict[str, Any]:
        """What ``CoCa`` is given."""
        return {
            "embed_dim": self.embed_dim,
            "vision_cfg": self.vision_cfg,
            "text_cfg": self.text_cfg,
            "multimodal_cfg": self.multimodal_cfg,
            "quick_gelu": self.quick_gelu,
            "pad_id": self.text_cfg.get("pad_id", 0),
        }


class CoCaForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """An open_clip ``CoCa`` that captions as transformers' models do.

    Args:
        config: what it is built from.
        coca: the model itself, if there is one already; else it is made, with random weights.
    """

    config_class = CoCaConfig
    config: CoCaConfig
    main_input_name = "pixel_values"
    base_model_prefix = ""
    _supports_sdpa = True

    def __init__(self, config: CoCaConfig, coca: CoCa | None = None) -> None:
        super().__init__(config)
        self.coca = CoCa(**config.coca) if coca is None else coca
        vocabulary, pad_id = self.coca.text.vocab_size, self.coca.pad_id
        self.generation_config = GenerationConfig(
            decoder_start_token_id=vocabulary - 2,  # where open_clip's tokenizer has its start and end
            eos_token_id=vocabulary - 1,
            pad_token_id=pad_id,
            suppress_tokens=[pad_id],  # masks take it for padding wherever it stands
            use_cache=False,
        )
        if coca is None:
            self.post_init()

    @classmethod
    def wrap(cls, coca: CoCa) -> CoCaForConditionalGeneration:
        """Return a model that is open_clip's own beneath: no weight is copied.

        Raises:
            TypeError: towers of other libraries.
            ValueError: a model that its own config would not build again.
        """
        return cls(config_of(coca), coca)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Fill in what open_clip leaves as it finds it: a projection, and masks of a model read from disk."""
        if isinstance(module, MultimodalTransformer):
            nn.init.normal_(module.text_projection, std=module.width**-0.5)
            module.attn_mask = module.build_attention_mask()
        elif isinstance(module, TextTransformer):
            module.attn_mask = module.build_causal_mask()

    def get_input_embeddings(self) -> nn.Module:
        """The token embeddings."""
        embeddings: nn.Module = self.coca.text.token_embedding
        return embeddings

    def forward(
        self,
        pixel_values: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        **_: Any,
    ) -> Seq2SeqLMOutput:
        """Run CoCa's own towers over whole sequences.

        Args:
            pixel_values: ``[B, 3, H, W]``; not read where ``encoder_outputs`` is given.
            decoder_input_ids: ``[B, T]``, begun by the start token; made of ``labels`` if not given.
            labels: ``[B, T]``, -100 at padding.
            encoder_outputs: image tokens ``[B, S, embed_dim]``.
        """
        if encoder_outputs is None:
            encoder_outputs = self.get_encoder()(pixel_values)
        if decoder_input_ids is None:
            decoder_input_ids = self._shifted(labels)
        token_BTD = self.coca._encode_text(decoder_input_ids)[1]
        logits_BTV = self.coca.text_decoder(encoder_outputs.last_hidden_state, token_BTD)
        loss = None
        if labels is not None:
            loss = cross_entropy(logits_BTV.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE)
        return Seq2SeqLMOutput(
            loss=loss, logits=logits_BTV, encoder_last_hidden_state=encoder_outputs.last_hidden_state
        )

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, decoder_input_ids: Tensor, encoder_outputs: BaseModelOutput | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Return what a step reads: the whole answer so far."""
        return {"decoder_input_ids": decoder_input_ids, "encoder_outputs": encoder_outputs}

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        """Return what ``generate`` calls once."""
        return _ImageEncoder(self.coca)

    def _shifted(self, labels: Tensor | None) -> Tensor:
        if labels is None:
            raise ValueError("CoCa needs `decoder_input_ids` or `labels`")
        settings = self.generation_config
        ids_BT = labels.roll(1, 1)
        ids_BT[:, 0] = settings.decoder_start_token_id
        return ids_BT.masked_fill(ids_BT == IGNORE, settings.pad_token_id)


class _ImageEncoder(nn.Module):
    """A CoCa's image tower, under the name and with the outputs that ``generate`` expects."""

    main_input_name = "pixel_values"

    def __init__(self, coca: CoCa) -> None:
        super().__init__()
        self._encode = coca._encode_image

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutput:
        """Return image tokens ``[B, S, embed_dim]``."""
        return BaseModelOutput(self._encode(pixel_values)[1])


def config_of(coca: CoCa) -> CoCaConfig:
    """Return what would build a model like this one.

    Raises:
        TypeError: towers of other libraries.
        ValueError: it would build another.
    """
    check_towers(coca)
    for block in (module for module in coca.modules() if type(module).__name__ == "ResidualAttentionBlock"):
        if block.ln_1.eps != _EPS or getattr(block.mlp.gelu, "approximate", "none") != "none":
            raise ValueError("A CoCa with `norm_kwargs` or `act_kwargs` has no config here; leave them out")
    quick = type(coca.visual.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
    multimodal_cfg = _stack(coca.text_decoder) | {"context_length": coca.text_decoder.context_length}
    config = CoCaConfig(coca.visual.output_dim, _vision_cfg(coca.visual), _text_cfg(coca.text), multimodal_cfg, quick)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in CoCa(**config.coca).state_dict().items()}
    found = {name: tensor.shape for name, tensor in coca.state_dict().items() if not name.startswith("mue_exits.")}
    if shapes != found:
        other = sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name))
        raise ValueError(f"This CoCa is not what its config would build: {other[:3]} are of other shapes")
    return config


def _vision_cfg(visual: Any) -> dict[str, Any]:
    pool, stack = visual.attn_pool, visual.transformer
    found = _stack(stack) | {
        "head_width": stack.width // stack.resblocks[0].attn.num_heads,
        "image_size": list(visual.image_size),
        "patch_size": list(visual.patch_size),
        "attentional_pool": getattr(visual, "attn_pool_type", "") or pool is not None,
        "no_ln_pre": isinstance(visual.ln_pre, nn.Identity),
        "final_ln_after_pool": visual.final_ln_after_pool,
        "pool_type": visual.pool_type if visual.pool_type != "none" else "tok",
        "output_tokens": visual.output_tokens,
    }
    del found["heads"]
    if pool is not None:
        found |= {"attn_pooler_queries": len(pool.query), "attn_pooler_heads": pool.attn.num_heads}
    return found


def _text_cfg(text: Any) -> dict[str, Any]:
    return _stack(text.transformer) | {
        "context_length": text.context_length,
        "vocab_size": text.vocab_size,
        "embed_cls": text.cls_emb is not None,
        "no_causal_mask": text.attn_mask is None,
        "pad_id": text.pad_id,
        "eos_id": text.eos_id,
        "pool_type": text.pool_type,
        "proj_type": "none" if text.text_projection is None else "linear",
        "proj_bias": isinstance(text.text_projection, nn.Linear),
        "output_tokens": text.output_tokens,
    }


def check_towers(coca: CoCa) -> None:
    """Refuse what has no view.

    Raises:
        TypeError: which tower, and what it must be.
    """
    towers = {"visual": VisionTransformer, "text": TextTransformer, "text_decoder": MultimodalTransformer}
    for name, kind in towers.items():
        if not isinstance(tower := getattr(coca, name), kind):
            raise TypeError(f"CoCa's `{name}` must be open_clip's {kind.__name__}, got {type(tower).__name__}")
    for name in towers:
        stack = getattr(coca, name)
        block = getattr(stack, "transformer", stack).resblocks[0]
        if not isinstance(block.attn, nn.MultiheadAttention):
            raise TypeError(f"CoCa's `{name}` must have open_clip's default blocks, got {type(block).__name__}")


def _stack(transformer: Any) -> dict[str, Any]:
    block = transformer.resblocks[0]
    return {
        "width": transformer.width,
        "layers": len(transformer.resblocks),
        "heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.c_fc.out_features / transformer.width,
        "ls_init_value": None if isinstance(block.ls_1, nn.Identity) else 1e-5,
    }


AutoConfig.register(CoCaConfig.model_type, CoCaConfig, exist_ok=True)
AutoModelForImageTextToText.register(CoCaConfig, CoCaForConditionalGeneration, exist_ok=True)
