"""Where a backbone comes from: a module, a folder or hub name, or a config."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForVisualQuestionAnswering,
    Blip2ForConditionalGeneration,
    BlipForConditionalGeneration,
    BlipForQuestionAnswering,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    T5Gemma2ForConditionalGeneration,
    UdopForConditionalGeneration,
    VisionEncoderDecoderModel,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from lightning_mue.backbones.udop import UNREAD as UDOP_UNREAD
from lightning_mue.backbones.view import EXITS, unwrapped

_LOADING = RLock()
_COCA = "open_clip_coca"
OPEN_CLIP = "open_clip:"
"""Prefix of what open_clip knows by name."""
_OF_TEXT = ("t5", "bart", "mbart")
"""Types of models that read no picture."""
_BLIP = (BlipForConditionalGeneration, BlipForQuestionAnswering)
_UNREAD: dict[type[nn.Module], tuple[str, ...]] = {
    VisionEncoderDecoderModel: ("encoder.pooler.",),
    UdopForConditionalGeneration: UDOP_UNREAD,
    T5Gemma2ForConditionalGeneration: ("model.encoder.vision_tower.head.",),
}
"""Prefixes of weights that are never read. Published models lack them, so each loading would give others."""
_ANSWERING = {
    "blip": tuple(kind.__name__ for kind in _BLIP),
    "blip-2": (Blip2ForConditionalGeneration.__name__,),
}
"""Type -> the classes that answer, of types of which others only compare or match."""


def build_backbone(source: nn.Module | str | Mapping[str, Any]) -> nn.Module:
    """Return the model that ``source`` describes.

    Args:
        source: a module (returned as it is; open_clip's CoCa inside the shell that gives it a config); a folder or hub
            name (``from_pretrained``); ``open_clip:`` and one of open_clip's own CoCas, such as
            ``open_clip:coca_ViT-B-32`` (random weights) or ``open_clip:coca_ViT-B-32:laion2b_s13b_b90k``; or a config
            as a mapping with ``model_type`` (random weights). BLIP captions, or answers questions where the config's
            ``architectures`` are ``[BlipForQuestionAnswering]``. A ``generation_config`` entry of the mapping becomes
            the model's; ``position_std`` is the standard deviation of learned position embeddings. (The configs' own is
            that of all weights, some 0.02; beside normed image features of 1 the model then hardly knows where things
            are.)

    Raises:
        ValueError: a mapping without ``model_type``, or a BLIP or BLIP-2 that neither captions nor answers.
    """
    if isinstance(source, nn.Module):
        return _shell().wrap(source) if type(source).__name__ == "CoCa" else source
    if isinstance(source, str):
        if source.startswith(OPEN_CLIP):
            return _open_clip(source.removeprefix(OPEN_CLIP))
        if (kept := Path(source, "config.json")).is_file() and _COCA in kept.read_text(encoding="utf-8"):
            _shell()
        # What is kept in float16 does not train in it; transformers loads into eval mode, which Lightning would keep.
        auto = _auto_class(AutoConfig.from_pretrained(source))
        return _ready(auto.from_pretrained(source, dtype=torch.float32).train())
    settings = dict(source)
    if "model_type" not in settings:
        raise ValueError(f"A backbone config needs `model_type` (such as 'florence2'), got the keys {sorted(settings)}")
    if settings["model_type"] == _COCA:
        _shell()
    generation, position_std = settings.pop("generation_config", None), settings.pop("position_std", None)
    described = AutoConfig.for_model(**settings)
    model: Any = _auto_class(described).from_config(described)
    if generation:
        model.generation_config = GenerationConfig(**generation)
    model = _ready(model)
    if position_std is not None:
        learned = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
        for name, parameter in model.named_parameters():
            is_position = "position" in name or ".wpe." in name  # the latter GPT-2's
            if is_position and (name in learned or name.endswith(("_embedding", "_embeddings"))):
                nn.init.normal_(parameter, std=position_std)
    return model


@contextmanager
def exits_expected() -> Iterator[None]:
    """Let transformers load folders with exits, which models do not have yet, without a report of unknown weights."""
    with _LOADING:
        before = PreTrainedModel._keys_to_ignore_on_load_unexpected
        PreTrainedModel._keys_to_ignore_on_load_unexpected = [*(before or ()), rf"^{EXITS}\."]
        try:
            yield
        finally:
            PreTrainedModel._keys_to_ignore_on_load_unexpected = before


def _auto_class(config: PreTrainedConfig) -> Any:
    """Return the class of transformers that makes the model; of BLIP a config alone does not say which is meant."""
    able = _ANSWERING.get(config.model_type, ())
    named = (config.architectures or [])[:1] if able else []
    if named and named[0] not in able:
        raise ValueError(
            f"A {config.model_type}'s `architectures` must be {' or '.join(f'[{name}]' for name in able)}, got "
            f"{named}; others have no decoder that answers."
        )
    if named == [BlipForQuestionAnswering.__name__]:
        return AutoModelForVisualQuestionAnswering
    return AutoModelForSeq2SeqLM if config.model_type in _OF_TEXT else AutoModelForImageTextToText


def _is_unread(model: Any, name: str) -> bool:
    """Whether nothing reads these weights, which the model has all the same."""
    return any(isinstance(model, kind) and name.startswith(prefixes) for kind, prefixes in _UNREAD.items())


def _ready(model: Any) -> nn.Module:
    """Let what is never read not learn, for distributed training would wait for its gradients.

    The ``generate`` of BLIP and BLIP-2 obeys the generation config of a part, which no folder keeps: let it be the
    model's; what tokens this does not name, the part's does.
    """
    for name, parameter in model.named_parameters():
        if _is_unread(model, name):
            parameter.requires_grad_(False)
    if (part := _generating_part(model)) is not None:
        config, own = model.generation_config, part.generation_config
        for name in ("decoder_start_token_id", "bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(config, name) is None:
                setattr(config, name, getattr(own, name))
        part.generation_config = config
    ready: nn.Module = model
    return ready


def _generating_part(model: Any) -> Any | None:
    """Return the part whose ``generate`` the model's own calls, or None."""
    if isinstance(model, Blip2ForConditionalGeneration):
        return model.language_model
    return model.text_decoder if isinstance(model, _BLIP) else None


def _open_clip(name: str) -> nn.Module:
    """Return one of open_clip's CoCas, by name and tag of its weights."""
    import open_clip

    name, _, tag = name.partition(":")
    coca = open_clip.create_model(name, pretrained=tag or None, load_weights=bool(tag))
    model: Any = _shell().wrap(coca)
    if not tag:
        coca.apply(model._init_weights)
    return model.train()


def _shell() -> Any:
    """Return the class of CoCas; once it is imported, transformers knows of it."""
    from lightning_mue.backbones.coca_model import CoCaForConditionalGeneration

    return CoCaForConditionalGeneration


def backbone_config(model: Any) -> dict[str, Any]:
    """Return the config, as plain values, from which ``build_backbone`` makes an equal model (weights apart)."""
    if not hasattr(model, "config"):
        raise TypeError(
            f"{type(model).__name__} has no config that would build it again; give open_clip's CoCa to "
            "`lightning_mue.backbones.build_backbone` first, and attach exits to what it returns."
        )
    config: PreTrainedConfig = model.config
    part = _generating_part(model)
    found = {name: value for name, value in config.to_diff_dict().items() if name != EXITS} | {
        "model_type": config.model_type,
        "generation_config": (model if part is None else part).generation_config.to_diff_dict(),
    }
    if isinstance(model, _BLIP):
        answers = isinstance(model, BlipForQuestionAnswering)
        found["architectures"] = [(BlipForQuestionAnswering if answers else BlipForConditionalGeneration).__name__]
    return found


def read_weights(source: str, prefix: str) -> dict[str, torch.Tensor]:
    """Return the weights under a prefix, which is left out of their names, of a folder or hub name; no pickle is read.

    Raises:
        ValueError: there are no safetensors.
    """
    files: list[str] = []
    if (whole := cached_file(source, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False)) is not None:
        files = [whole]  # as transformers does where an older index lies beside it
    elif (
        index := cached_file(source, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    ) is not None:
        files = get_checkpoint_shard_files(source, index)[0]
    if not files:
        raise ValueError(f"{source} holds no `{SAFE_WEIGHTS_NAME}`; save it again with `save_pretrained`.")
    found: dict[str, torch.Tensor] = {}
    for file in files:
        with safe_open(file, "pt") as weights:
            names = [name for name in weights.keys() if name.startswith(prefix)]  # noqa: SIM118
            found |= {name.removeprefix(prefix): weights.get_tensor(name) for name in names}
    return found


def fingerprint(model: nn.Module) -> str:
    """Return a hash of all weights: names, shapes, types and bytes. Equal weights give equal fingerprints.

    Tied weights make different functions where exits take image and text apart, so how they meet is hashed then too.
    Weights that are never read are left out.
    """
    model, digest = unwrapped(model), hashlib.sha256()
    exits: Any = getattr(model, EXITS, None)
    if exits is not None and exits.encoder != "joint":
        digest.update(exits.encoder.encode())
    for name, tensor in sorted(model.state_dict().items()):
        if _is_unread(model, name):
            continue
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        for part in _parts(tensor):
            flat = part.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()[:16]


def _parts(tensor: Any) -> list[torch.Tensor]:
    """Return the plain tensors of which one consists: a quantised one of several."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in _parts(getattr(tensor, name))]
