"""What a generation config asks of each step's logits, over arrays: transformers' processors, where there are none.

Shapes: ``R`` rows, ``t`` tokens so far, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray
TokenRule = Callable[[Array, Array, Sequence[int]], Array]
"""(ids so far ``[R, t]``, logits ``[R, V]``, the batch's row of each) -> logits."""

Allowed = Callable[[int, Array], list[int]]
"""Row, tokens so far -> tokens that may come next."""


def token_rules(
    settings: Mapping[str, Any], max_new_tokens: int, allowed: Allowed | None, prompts: Sequence[Sequence[int]]
) -> list[TokenRule]:
    """Return the rules of these settings, in the order in which ``generate`` applies them.

    Args:
        settings: ``DecodeSettings.plain``.
        max_new_tokens: at most.
        allowed: a constraint, or None; it is shown the start token and the answer so far, no decoder prompt.
        prompts: row -> tokens that are given, the start token among them.
    """
    rules: list[TokenRule] = []
    if settings["no_repeat_ngram_size"]:
        rules.append(_no_repeat(settings["no_repeat_ngram_size"]))
    if allowed is not None:
        rules.append(_constrained(allowed, prompts))
    if settings["forced_bos_token_id"] is not None:
        rules.append(_forced(settings["forced_bos_token_id"], [1] * len(prompts)))
    if settings["forced_eos_token_id"] is not None:
        last = [max_new_tokens + len(prompt) - 1 for prompt in prompts]
        rules.append(_forced(settings["forced_eos_token_id"], last))
    if settings.get("suppress_tokens"):
        rules.append(_suppressed(settings["suppress_tokens"]))
    return rules


def _no_repeat(size: int) -> TokenRule:
    """No ``size`` tokens may come twice in that order, a decoder prompt's among them."""

    def rule(ids_Rt: Array, logits_RV: Array, _rows: Sequence[int]) -> Array:
        if ids_Rt.shape[1] < size:
            return logits_RV
        logits_RV = logits_RV.copy()
        grams_RnS = np.lib.stride_tricks.sliding_window_view(ids_Rt, size, axis=1)
        latest_RS = ids_Rt[:, ids_Rt.shape[1] - size + 1 :]
        row_C, at_C = np.nonzero((grams_RnS[..., :-1] == latest_RS[:, None]).all(-1))
        logits_RV[row_C, grams_RnS[row_C, at_C, -1]] = -np.inf
        return logits_RV

    return rule


def _constrained(allowed: Allowed, prompts: Sequence[Sequence[int]]) -> TokenRule:
    def rule(ids_Rt: Array, logits_RV: Array, rows: Sequence[int]) -> Array:
        constrained_RV = np.full_like(logits_RV, -np.inf)
        for i, row in enumerate(rows):
            ids_t = np.concatenate([ids_Rt[i, :1], ids_Rt[i, len(prompts[row]) :]])
            if not (tokens := allowed(row, ids_t)):
                raise ValueError(f"`prefix_allowed_tokens_fn` must allow a token, got none for row {row} after {ids_t}")
            constrained_RV[i, tokens] = logits_RV[i, tokens]
        return constrained_RV

    return rule


def _suppressed(tokens: Sequence[int]) -> TokenRule:
    def rule(_ids_Rt: Array, logits_RV: Array, _rows: Sequence[int]) -> Array:
        logits_RV = logits_RV.copy()
        logits_RV[:, list(tokens)] = -np.inf
        return logits_RV

    return rule


def _forced(tokens: int | Sequence[int], length: Sequence[int]) -> TokenRule:
    """Where a row has so many tokens, only these may follow."""

    def rule(ids_Rt: Array, logits_RV: Array, rows: Sequence[int]) -> Array:
        here = [i for i, row in enumerate(rows) if length[row] == ids_Rt.shape[1]]
        if not here:
            return logits_RV
        logits_RV = logits_RV.copy()
        logits_RV[here] = -np.inf
        logits_RV[np.array(here)[:, None], np.atleast_1d(tokens)] = 0
        return logits_RV

    return rule
