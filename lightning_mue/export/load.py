"""Loading a bundle: everything is checked before anything is believed."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from lightning_mue.backbones.processor import Processor
from lightning_mue.export.freeze import POLICY, PROCESSOR
from lightning_mue.export.manifest import check_manifest
from lightning_mue.export.model_file import CONFIG, WEIGHTS, load_files, read_config
from lightning_mue.inference.engine import ExitEngine
from lightning_mue.policy import ExitPolicy


def load(folder: str | os.PathLike[str], device: str | torch.device = "cpu", runtime: str | None = None) -> ExitEngine:
    """Read a bundle that ``freeze`` wrote; no Lightning, no network, no pickle.

    Args:
        folder: of the bundle.
        device: where the model goes.
        runtime: as of `ExitEngine`.

    Returns:
        An engine in eval mode, with the bundle's processor if it has one.

    Raises:
        ValueError: not a bundle, another schema, or a file that is missing, damaged or of another bundle.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a bundle: there is no such folder.")
    check_manifest(folder)
    for name in (CONFIG, WEIGHTS, POLICY):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} lacks {name!r}; copy the bundle again.")
    config, policy = read_config(folder), ExitPolicy.load(folder / POLICY)
    if policy.fingerprint != config["fingerprint"]:
        raise ValueError(
            f"{folder} mixes files of different bundles: {POLICY} is of another model ({policy.fingerprint}) than "
            f"{CONFIG} ({config['fingerprint']}). Copy the bundle again, or calibrate and freeze."
        )
    model = load_files(folder, config).to(device)
    processor = Processor.load(folder / PROCESSOR) if (folder / PROCESSOR).is_dir() else None
    return ExitEngine(model, policy, check_fingerprint=False, processor=processor, runtime=runtime)
