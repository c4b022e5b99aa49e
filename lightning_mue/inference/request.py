"""What a caller asks of an engine, with tensors or arrays: what is refused, and which rows are of a policy's groups."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_mue.inference.schedule import DecoderExits
from lightning_mue.policy import ExitPolicy, ExitRule

_NOT_DONE = {
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "num_return_sequences",
    "max_length",
    "generation_config",
    "logits_processor",
    "stopping_criteria",
    "streamer",
}


def check_inputs(inputs: Mapping[str, Any]) -> None:
    """Refuse what an engine does not do.

    Raises:
        ValueError: what was asked.
    """
    if asked := sorted(_NOT_DONE & set(inputs)):
        raise ValueError(f"The engine does not do {asked}; leave them out.")
    if "decoder_input_ids" in inputs:
        raise ValueError("The engine takes `decoder_prompt [B, P]`, without the start token, for `decoder_input_ids`.")


def check_texts(images: Sequence[Any], **texts: Sequence[str] | None) -> None:
    """Refuse texts that are not one for each picture.

    Raises:
        ValueError: which, and how many there are.
    """
    for name, given in texts.items():
        if given is not None and (isinstance(given, str) or len(images) != len(given)):
            found = "one text" if isinstance(given, str) else str(len(given))
            raise ValueError(f"`{name}` must be a list with one text for each of {len(images)} images, got {found}")


def check_prompts(prompts: Sequence[str], are_read: bool) -> None:
    """Refuse prompts that a model would pass over.

    Raises:
        ValueError: the first of them.
    """
    if not are_read and (asked := [prompt for prompt in prompts if prompt]):
        raise ValueError(
            f"This model reads pictures alone and would answer the same to any prompt; give empty ones, got "
            f"{asked[0]!r}. A text that the answer goes on from is a decoder prompt."
        )


def by_group(
    policy: ExitPolicy, groups: Sequence[str] | None, inputs: Mapping[str, Any], names: Sequence[str]
) -> tuple[int, list[int], list[int]]:
    """Return the size of a batch, the rows of a policy's groups, and all others.

    Raises:
        ValueError: groups do not name one for each row.
    """
    assert policy.groups is not None
    size = len(next(value for name, value in inputs.items() if name in names and value is not None))
    if groups is None or len(groups) != size:
        raise ValueError(
            f"The policy leaves early for the groups {list(policy.groups)} alone: `groups` must name one for each of "
            f"{size} rows, got {groups if groups is None else len(groups)}"
        )
    rows = [i for i, group in enumerate(groups) if group in policy.groups]
    return size, rows, sorted({*range(size)} - {*rows})


def longest_answer(policy: ExitPolicy, max_new_tokens: int | None) -> int | None:
    """Return how many tokens are asked for: what was certified, if nothing is said."""
    if max_new_tokens is None and policy.certificate is not None:
        certified: int | None = policy.certificate.decode.get("max_new_tokens")
        return certified
    return max_new_tokens


def decoder_exits(
    policy: ExitPolicy,
    steps: int,
    forced: Sequence[Sequence[int]] | None = None,
) -> DecoderExits:
    """Return the decoder's rule as the schedule wants it, for at most ``steps`` tokens."""
    rule = policy.rules.get("decoder", ExitRule("static", (1,), (math.inf,)))
    return DecoderExits(
        rule.signal, lambda step: rule.thresholds_at(step, steps), policy.kv_fill, policy.backlog, forced
    )
