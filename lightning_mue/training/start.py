"""Where a training begins and what it may change."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

import torch
from tokenizers import Tokenizer
from torch import nn

from lightning_mue.exits import attached

Learners = Literal["all", "exits", "gates"]


def take_weights(module: nn.Module, path: str | os.PathLike[str], data: Any = None) -> list[str]:
    """Take over a checkpoint's weights wherever name and shape are the same; return the names left as they were.

    Args:
        module: takes them.
        path: of a Lightning checkpoint.
        data: the data module. Its tokenizer must be the checkpoint's, or embeddings would mean other texts; and what it
            holds out for calibration must not have trained the checkpoint.

    Raises:
        ValueError: the file is no Lightning checkpoint, nothing in it fits, or the data do not.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # truncated or foreign: torch raises what it stumbles over
        raise ValueError(f"`init_from` must be a Lightning checkpoint, which {path} is not ({error})") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"`init_from` must be a Lightning checkpoint, which {path} is not")
    kept, processor = checkpoint.get("ShardsDataModule", {}).get("tokenizer"), getattr(data, "processor", None)
    _check_held_out(checkpoint.get("datamodule_hyper_parameters", {}), getattr(data, "hparams", {}), path)
    if kept and processor and Tokenizer.from_str(kept).get_vocab() != processor.tokenizer.get_vocab():
        raise ValueError(
            f"`init_from`: {path} was trained with another tokenizer. Freeze it, and give the data that bundle's "
            "folder `processor` as `processor`."
        )
    own = module.state_dict()
    fitting = {k: v for k, v in checkpoint["state_dict"].items() if k in own and own[k].shape == v.shape}
    if not fitting:
        raise ValueError(f"`init_from`: no weight in {path} has the name and shape of one of this model's")
    module.load_state_dict(fitting, strict=False)
    return sorted(set(own) - set(fitting))


def _check_held_out(before: Mapping[str, Any], now: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Refuse to hold out of shards what a checkpoint was trained on; of other shards nothing is known."""
    if not now.get("holdout") or before.get("train") != now["train"]:
        return
    if before["seed"] != now["seed"] or before["holdout"] < now["holdout"]:
        raise ValueError(
            f"`init_from`: {path} was trained on some of what this run holds out for calibration (it had `data.seed` "
            f"{before['seed']} and `holdout` {before['holdout']}, this run has {now['seed']} and {now['holdout']}), so "
            "a certificate would be of samples that were learnt; give both runs the same"
        )


def let_learn(model: nn.Module, which: Learners) -> None:
    """Freeze all parameters of a backbone with exits but those that are to learn.

    Args:
        model: a backbone with exits attached.
        which: ``all``; ``exits``, so that full-depth outputs stay as they are; or ``gates`` alone.

    Raises:
        ValueError: an unknown choice, or gates are to learn and there are none.
    """
    if which not in ("all", "exits", "gates"):
        raise ValueError(f"`learns` must be all, exits or gates, got {which!r}")
    exits = attached(model)
    assert exits is not None
    if which == "gates" and not len(exits.gates):
        raise ValueError("`learns` is 'gates' and the exits have none; set `gate: true`")
    if which == "all":
        return
    model.requires_grad_(False)
    (exits if which == "exits" else exits.gates).requires_grad_(True)
