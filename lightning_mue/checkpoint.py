"""Reading a checkpoint of ``mue fit`` without a Trainer."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from lightning_mue.backbones.processor import Processor, build_processor
from lightning_mue.training import MultiExitModule


def load_checkpoint(path: str | os.PathLike[str]) -> tuple[MultiExitModule, Processor | None]:
    """Return the module in eval mode, and the processor if the checkpoint's data module kept a tokenizer or a name.

    Raises:
        ValueError: the file is not a checkpoint of a MultiExitModule.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # truncated, foreign, or more than plain values: torch raises what it stumbles over
        raise ValueError(
            f"{path} must be a Lightning checkpoint of a MultiExitModule that holds weights and plain values; it "
            f"cannot be read: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint or "hyper_parameters" not in checkpoint:
        raise ValueError(f"{path} must be a Lightning checkpoint of a MultiExitModule")
    module = MultiExitModule.load_from_checkpoint(Path(path), map_location="cpu", weights_only=True).eval()
    data = checkpoint.get("ShardsDataModule")
    if data is None:
        return module, None
    if "processor" in data:
        return module, Processor.load(data["processor"])
    settings = checkpoint["datamodule_hyper_parameters"]
    shape = {name: settings[name] for name in ("image_size", "image_tokens")}
    shape["keep_aspect"] = settings.get("keep_aspect", False)  # not known to older checkpoints
    return module, build_processor(data["tokenizer"], **shape)
