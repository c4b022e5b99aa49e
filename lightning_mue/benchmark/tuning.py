"""Tuning the methods of the papers: each at its boldest setting that keeps what a calibrated policy promises."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from rich.progress import Progress
from torch import nn

from lightning_mue.answers import Answers
from lightning_mue.backbones import num_layers, view
from lightning_mue.benchmark.exam import count
from lightning_mue.callbacks.batches import Batch, on_device, rows_of
from lightning_mue.exits import attached, exits_on_the_way
from lightning_mue.methods import STATIC, boldest, families
from lightning_mue.policy import ExitPolicy

SAMPLES = 600
"""So many samples of the recipe's *propose* part tune the methods of the literature."""


@dataclass
class Tuned:
    """Methods of the literature: their policies, notes on rows of the table, and a note on all."""

    policies: dict[str, ExitPolicy] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    note: str = ""


def tune(
    decode: Callable[[ExitPolicy, list[Batch]], Answers],
    model: nn.Module,
    policy: ExitPolicy,
    tuning: Iterable[Batch],
    bars: Progress,
) -> Tuned:
    """Find each method's boldest setting that keeps what ``policy`` promises; of the static depths, only say which.

    Args:
        decode: policy, batches -> its answers.
        model: the backbone with its exits.
        policy: the calibrated one.
        tuning: batches.
        bars: gets one more.

    Raises:
        ValueError: there are no exits, there is no data, or the policy has no certificate that says what to keep.
    """
    exits, backbone = attached(model), view(model)
    if policy.certificate is None:
        raise ValueError("`methods` are tuned to the promise of the calibrated policy; this one has no certificate.")
    if exits is None:
        raise ValueError("The methods compared need exits; call `attach_exits(model, config)` and train them.")
    promise, batches = policy.certificate.promise, [on_device(batch, model) for batch in tuning]
    if not batches:
        raise ValueError("There is no data to tune the methods on; give `tuning`, or more calibration data.")
    steps = backbone.decode_settings(None).max_new_tokens
    tuned, least = Tuned(), promise.least(decode(ExitPolicy.full_depth(), batches).quality)
    kept = f"{promise.keep:.1%}" if promise.keep is not None else f"all but {promise.drop:g}"
    methods = families(exits_on_the_way(backbone, exits), num_layers(backbone), steps, exits.config.gate)
    for method, family in bars.track(methods.items(), description="tuning the methods"):
        found = boldest(family, lambda p: decode(p, batches).quality, least)
        if method != STATIC:
            tuned.policies[method] = found
            tuned.notes[method] = "" if found.rules else f"at full depth: no setting kept {kept}"
        elif found.rules:
            tuned.notes[static(found.rules["decoder"].layers[0])] = f"boldest static depth that kept {kept}"
    tuned.note = (
        f"Each method of the literature has the boldest setting that kept {kept} of full-depth quality on "
        f"{count(batches)} samples of the calibration data; unlike the calibrated exits, none is certified."
    )
    return tuned


def tuning_batches(data: Any) -> list[Batch]:
    """Return batches of about ``SAMPLES`` samples of the *propose* part of a datamodule."""
    batches: list[Batch] = []
    for batch in data.val_dataloader():
        proposes = [data.split_of(cluster) == "propose" for cluster in batch["cluster"]]
        if any(proposes):
            batches.append(rows_of(batch, proposes))
        if count(batches) >= SAMPLES:
            break
    return batches


def static(depth: int) -> str:
    """Return the name of the line whose tokens all leave the decoder at this depth."""
    return f"{STATIC} {depth}"
