"""Comparing ways to answer the same samples: one run, in turn, batch 1, the whole answer on the wall clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_mue.backbones import view
from lightning_mue.inference.engine import ExitEngine
from lightning_mue.inference.rows import PrefixFn, groups_of

Variant = Callable[[dict[str, Any]], Tensor]
"""Answers one sample: its inputs (batch 1) -> token ids."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds per sample of one variant; each number is the median over repeats.

    Args:
        p50_ms: median over samples.
        p95_ms: 95th percentile over samples.
        mean_ms: mean over samples.
        spread_ms: interquartile range of the repeats' medians; None with one repeat.
        ratio: median over samples of this variant's time over the baseline's, on the same sample in the same repeat.
        ratio_spread: interquartile range of the repeats' ratios; None with one repeat.
    """

    p50_ms: float
    p95_ms: float
    mean_ms: float
    spread_ms: float | None
    ratio: float
    ratio_spread: float | None


def compare(
    variants: Mapping[str, Variant],
    samples: Sequence[dict[str, Any]],
    repeats: int = 3,
    warmup: int = 1,
    on_done: Callable[[int, int], None] | None = None,
    baseline: str | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time every variant on every sample; only ratios within one run are to be trusted.

    Variants take turns sample by sample, and who begins rotates, so that drift of the machine and warm caches favour
    none.

    Args:
        variants: name -> what answers.
        samples: inputs of one sample each (batch 1).
        repeats: passes over all samples.
        warmup: so many samples are first answered by every variant untimed.
        on_done: called after each sample with the number done and the number in all.
        baseline: what ratios refer to; the first variant if not given.
        clock: seconds; a test may give its own.

    Raises:
        ValueError: nothing to compare, or the baseline is none of the variants.
    """
    if not variants or not samples or repeats < 1:
        raise ValueError(
            f"A comparison needs variants, samples and repeats, got {len(variants)}, {len(samples)} and {repeats}"
        )
    names = list(variants)
    baseline = names[0] if baseline is None else baseline
    if baseline not in variants:
        raise ValueError(f"`baseline` must be one of {names}, got {baseline!r}")
    for sample in samples[:warmup]:
        for name in names:
            variants[name](sample)
    ms = {name: np.zeros((repeats, len(samples))) for name in names}
    total = repeats * len(samples)
    for turn in range(total):
        repeat, i = divmod(turn, len(samples))
        # One more step in each repeat: else a sample would meet the same order whenever the counts divide.
        first = (i + repeat) % len(names)
        for name in names[first:] + names[:first]:
            ms[name][repeat, i] = _time(variants[name], samples[i], clock)
        if on_done is not None:
            on_done(turn + 1, total)
    return {name: _summary(of_variant, ms[baseline]) for name, of_variant in ms.items()}


def transformers_variant(
    model: nn.Module, max_new_tokens: int | None = None, prefix_fn: PrefixFn | None = None
) -> Variant:
    """Return transformers' own greedy ``generate`` of a backbone, put into eval mode."""
    backbone = view(model.eval())
    limit = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}

    @torch.inference_mode()
    def answer(inputs: dict[str, Any]) -> Tensor:
        settings = {"num_beams": 1, "do_sample": False, "prefix_allowed_tokens_fn": prefix_fn}
        return backbone.generate(inputs, **settings, **limit)

    return answer


def engine_variant(engine: ExitEngine, max_new_tokens: int | None = None, prefix_fn: PrefixFn | None = None) -> Variant:
    """Return the engine's answers under its policy."""
    return lambda inputs: (
        engine.generate(max_new_tokens, prefix_fn, groups=groups_of(engine.policy, inputs), **inputs).sequences
    )


def _time(variant: Variant, sample: dict[str, Any], clock: Callable[[], float]) -> float:
    _synchronise()
    begin = clock()
    variant(sample)
    _synchronise()
    return (clock() - begin) * 1e3


def _synchronise() -> None:
    """Wait for a CUDA device that is in use; asking about one must not start it."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _summary(ms: np.ndarray, baseline_ms: np.ndarray) -> Timing:
    """Sum up times ``[repeats, samples]``."""
    medians = np.median(ms, axis=1)
    ratios = np.median(ms / baseline_ms, axis=1)
    return Timing(
        p50_ms=float(np.median(medians)),
        p95_ms=float(np.median(np.percentile(ms, 95, axis=1))),
        mean_ms=float(np.median(ms.mean(axis=1))),
        spread_ms=_spread(medians),
        ratio=float(np.median(ratios)),
        ratio_spread=_spread(ratios),
    )


def _spread(values: np.ndarray) -> float | None:
    if len(values) < 2:
        return None
    low, high = np.percentile(values, [25, 75])
    return float(high - low)
