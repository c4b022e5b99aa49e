"""Greedy decoding as a transformers generation config asks for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    GenerationConfig,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
)

from lightning_mue.backbones.stream import DecodeSettings, Inputs, TokenProcessor
from lightning_mue.prompt import read_prompts, without_prompt

# Settings that change greedy tokens and that the engine does not do, with the values at which they do nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (None, 1.0),
    "encoder_repetition_penalty": (None, 1.0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None,),
    "begin_suppress_tokens": (None, []),
    "sequence_bias": (None,),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "exponential_decay_length_penalty": (None,),
    "guidance_scale": (None, 1.0),
    "renormalize_logits": (None, False),
    "remove_invalid_values": (None, False),
}
DEFAULT_MAX_NEW_TOKENS = 20


def read_settings(config: GenerationConfig, max_new_tokens: int | None) -> DecodeSettings:
    """Turn a generation config into greedy decode settings (its beams and sampling are not used).

    Raises:
        ValueError: a setting that the engine does not do, or a missing token id.
    """
    for name, harmless in _UNSUPPORTED.items():
        if (value := getattr(config, name, None)) not in harmless:
            raise ValueError(f"The generation config sets `{name}={value!r}`, which the engine does not do; unset it.")
    start = config.decoder_start_token_id if config.decoder_start_token_id is not None else config.bos_token_id
    if start is None or config.eos_token_id is None:
        raise ValueError("The generation config must name `decoder_start_token_id` and `eos_token_id`.")
    ends = (config.eos_token_id,) if isinstance(config.eos_token_id, int) else tuple(config.eos_token_id)
    pad = config.pad_token_id if config.pad_token_id is not None else ends[0]
    limit = _limit(config, max_new_tokens)
    plain = {
        "strategy": "greedy",
        "start_id": start,
        "end_ids": list(ends),
        "pad_id": pad,
        "max_new_tokens": limit,
        "no_repeat_ngram_size": config.no_repeat_ngram_size or 0,
        "forced_bos_token_id": config.forced_bos_token_id,
        "forced_eos_token_id": config.forced_eos_token_id,
    }
    if config.suppress_tokens:
        plain["suppress_tokens"] = list(config.suppress_tokens)
    return DecodeSettings(start, ends, pad, limit, plain)


def _limit(config: GenerationConfig, max_new_tokens: int | None) -> int:
    """Return the number of new tokens at most, as ``generate`` would (``max_length`` counts the start token)."""
    limit = max_new_tokens if max_new_tokens is not None else config.max_new_tokens
    if limit is None:
        limit = config.max_length - 1 if config.max_length is not None else DEFAULT_MAX_NEW_TOKENS
    if limit < 1:
        raise ValueError(f"`max_new_tokens` must be at least 1, got {limit}")
    return limit


def generate_as_asked(
    generate: Callable[..., Tensor],
    inputs: Inputs,
    decode_settings: Callable[[int | None], DecodeSettings],
    asked: Mapping[str, Any],
) -> Tensor:
    """Call transformers' ``generate``; with decoder prompts where there are any.

    Args:
        generate: of a model.
        inputs: tensors, batch first.
        decode_settings: of the backbone's view.
        asked: settings of ``generate``.
    """
    if "decoder_prompt" not in inputs:
        return generate(**inputs, **asked)
    settings = decode_settings(asked.get("max_new_tokens"))
    how = {**asked, "max_new_tokens": settings.max_new_tokens}  # a `max_length` would count the prompt
    return generate_with_prompts(generate, inputs, settings, **how)


def generate_with_prompts(
    generate: Callable[..., Tensor], inputs: Inputs, settings: DecodeSettings, **asked: Any
) -> Tensor:
    """Call transformers' ``generate`` with decoder prompts; return its ids without them, ``[B, 1 + T]``.

    Its positions know no padding inside a decoder's input, so rows with prompts of one length go together.

    Args:
        generate: of a model; given tensors of some rows, ``decoder_input_ids`` and what was asked.
        inputs: tensors, batch first; ``decoder_prompt`` among them.
        settings: of the decoding.
        **asked: settings of ``generate``.
    """
    tensors = {name: value for name, value in inputs.items() if value is not None and name != "decoder_prompt"}
    device = next(iter(tensors.values())).device
    prompts = read_prompts(inputs, len(next(iter(tensors.values()))), settings.start_id)
    found: dict[int, Tensor] = {}
    for length in sorted({len(prompt) for prompt in prompts}):
        rows = [r for r, prompt in enumerate(prompts) if len(prompt) == length]
        given = torch.tensor([prompts[r] for r in rows], device=device)
        ids = generate(
            **{name: value[torch.tensor(rows, device=device)] for name, value in tensors.items()},
            decoder_input_ids=given,
            **asked | _constraint_of(rows, prompts, asked),
        )
        found |= dict(zip(rows, torch.cat([ids[:, :1], ids[:, length:]], 1), strict=True))
    return pad_sequence([found[r] for r in range(len(prompts))], batch_first=True, padding_value=settings.pad_id)


def _constraint_of(rows: Sequence[int], prompts: Sequence[Sequence[int]], asked: Mapping[str, Any]) -> dict[str, Any]:
    if (allowed := asked.get("prefix_allowed_tokens_fn")) is None:
        return {}
    shown = without_prompt(allowed, prompts)
    return {"prefix_allowed_tokens_fn": lambda i, ids: shown(rows[i], ids)}


def build_processors(
    settings: DecodeSettings,
    prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None,
    prompts: Sequence[Sequence[int]],
) -> list[TokenProcessor]:
    """Return what transformers' processors do for these settings, in the order ``generate`` applies them."""
    plain = settings.plain
    processors: list[TokenProcessor] = []
    if plain["no_repeat_ngram_size"]:
        processors.append(_for_all_rows(NoRepeatNGramLogitsProcessor(plain["no_repeat_ngram_size"])))
    if prefix_allowed_tokens_fn is not None:
        processors.append(_by_row(without_prompt(prefix_allowed_tokens_fn, prompts)))
    if plain["forced_bos_token_id"] is not None:
        processors.append(_for_all_rows(ForcedBOSTokenLogitsProcessor(plain["forced_bos_token_id"])))
    if plain["forced_eos_token_id"] is not None:
        processors.append(_forced_end(settings.max_new_tokens, plain["forced_eos_token_id"], prompts))
    if plain.get("suppress_tokens"):
        processors.append(_suppressed(torch.tensor(plain["suppress_tokens"])))
    return processors


def _for_all_rows(processor: Callable[[Tensor, Tensor], Tensor]) -> TokenProcessor:
    return lambda ids_RT, logits_RV, _rows: processor(ids_RT, logits_RV)


def _suppressed(token_N: Tensor) -> TokenProcessor:
    """These tokens are never chosen; transformers' own looks each token of the vocabulary up in every step."""
    return lambda _ids_RT, logits_RV, _rows: logits_RV.index_fill(1, token_N.to(logits_RV.device), -torch.inf)


def _forced_end(max_new_tokens: int, end_id: int, prompts: Sequence[Sequence[int]]) -> TokenProcessor:
    """The last token of an answer comes later where the prompt is longer."""
    of = {n: ForcedEOSTokenLogitsProcessor(max_new_tokens + n, end_id) for n in {len(prompt) for prompt in prompts}}
    if len(of) == 1:
        return _for_all_rows(*of.values())

    def process(ids_RT: Tensor, logits_RV: Tensor, rows: Sequence[int]) -> Tensor:
        each = [of[len(prompts[row])](ids_RT[i : i + 1], logits_RV[i : i + 1]) for i, row in enumerate(rows)]
        return torch.cat(each)

    return process


def _by_row(allowed: Callable[[int, Tensor], list[int]]) -> TokenProcessor:
    """The constraint is asked for rows of the batch, though only some of them may be at hand."""

    def process(ids_RT: Tensor, logits_RV: Tensor, rows: Sequence[int]) -> Tensor:
        constraint = PrefixConstrainedLogitsProcessor(lambda i, ids: allowed(rows[i], ids), num_beams=1)
        return constraint(ids_RT, logits_RV)

    return process
