"""Loading a bundle: everything is checked before anything is believed. A bundle of graphs is loaded without torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_mue.export.manifest import check_manifest
from lightning_mue.policy import ExitPolicy
from lightning_mue.policy_file import EMBED_POLICY, EMBED_TEXT_POLICY
from lightning_mue.portable.names import GRAPH_WEIGHTS, GRAPHS, POLICY, PROCESSOR

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lightning_mue.backbones.processor import Processor
    from lightning_mue.inference.embedding import EmbedEngine
    from lightning_mue.inference.engine import ExitEngine
    from lightning_mue.portable.engine import PortableEngine


def load(
    folder: str | os.PathLike[str], device: str | torch.device = "cpu", runtime: str | None = None
) -> ExitEngine | PortableEngine:
    """Read a bundle that ``freeze`` wrote; no Lightning, no network, no pickle.

    Args:
        folder: of the bundle.
        device: where the model goes; graphs run on the CPU.
        runtime: as of `ExitEngine`; of a bundle of graphs it is ``onnxruntime``.

    Returns:
        An engine, with the bundle's processor if it has one. Of a bundle of graphs it takes and gives arrays.

    Raises:
        ValueError: not a bundle, another schema, or a file that is missing, damaged or of another bundle.
    """
    folder = _checked(folder)
    return _load_graphs(folder, device, runtime) if (folder / GRAPHS).is_file() else _load(folder, device, runtime)


def load_embedder(folder: str | os.PathLike[str], device: str | torch.device = "cpu") -> EmbedEngine:
    """Read a bundle of a model that compares pictures with texts, to embed them.

    It obeys the bundle's policies of embeddings, and that of answers where there is none.

    Args:
        folder: of the bundle; one of modules, not of graphs.
        device: where the model goes.

    Raises:
        ValueError: not such a bundle, another schema, or a file that is missing, damaged or of another bundle.
    """
    from lightning_mue.inference.embedding import EmbedEngine

    if (_checked(folder) / GRAPHS).is_file():
        raise ValueError(f"{folder} is a bundle of graphs, which do not embed; freeze the model without `runtime`.")
    model, policy, processor = _read(Path(folder), device)
    embeds, texts = (_embed_policy(Path(folder), name, policy) for name in (EMBED_POLICY, EMBED_TEXT_POLICY))
    return EmbedEngine(model, embeds or policy, check_fingerprint=False, processor=processor, text_policy=texts)


def _embed_policy(folder: Path, name: str, policy: ExitPolicy) -> ExitPolicy | None:
    """Return a policy of embeddings, of the same model as that of answers; None if there is none."""
    if not (folder / name).is_file():
        return None
    _check_same(folder, name, found := ExitPolicy.load(folder / name), POLICY, policy.fingerprint)
    return found


def _checked(folder: str | os.PathLike[str]) -> Path:
    """Return the folder of a bundle whose files are those that were written."""
    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is not a bundle: there is no such folder.")
    check_manifest(Path(folder))
    return Path(folder)


def _load(folder: Path, device: str | torch.device, runtime: str | None) -> ExitEngine:
    from lightning_mue.inference.engine import ExitEngine

    model, policy, processor = _read(folder, device)
    return ExitEngine(model, policy, check_fingerprint=False, processor=processor, runtime=runtime)


def _read(folder: Path, device: str | torch.device) -> tuple[nn.Module, ExitPolicy, Processor | None]:
    """Return the model, the policy of its answers and its processor, if there is one."""
    from lightning_mue.backbones.processor import Processor
    from lightning_mue.export.model_file import CONFIG, WEIGHTS, load_files, read_config

    _check_there(folder, CONFIG, WEIGHTS, POLICY)
    config, policy = read_config(folder), ExitPolicy.load(folder / POLICY)
    _check_same(folder, POLICY, policy, CONFIG, config["fingerprint"])
    model = load_files(folder, config).to(device)
    return model, policy, Processor.load(folder / PROCESSOR) if (folder / PROCESSOR).is_dir() else None


def _load_graphs(folder: Path, device: str | torch.device, runtime: str | None) -> PortableEngine:
    from lightning_mue.portable.engine import PortableEngine

    if runtime not in (None, "auto", PortableEngine.runtime) or str(device) != "cpu":
        raise ValueError(
            f"{folder} is a bundle of graphs, which run in {PortableEngine.runtime!r} on the CPU; got runtime "
            f"{runtime!r} and device {str(device)!r}. Freeze the model without `runtime` for others."
        )
    _check_there(folder, GRAPH_WEIGHTS, POLICY)
    engine = PortableEngine(folder)
    _check_same(folder, POLICY, engine.policy, GRAPHS, engine.files.facts["fingerprint"])
    return engine


def _check_there(folder: Path, *names: str) -> None:
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{folder} lacks {name!r}; copy the bundle again.")


def _check_same(folder: Path, name: str, policy: ExitPolicy, file: str, fingerprint: str | None) -> None:
    if policy.fingerprint != fingerprint:
        raise ValueError(
            f"{folder} mixes files of different bundles: {name} is of another model ({policy.fingerprint}) than "
            f"{file} ({fingerprint}). Copy the bundle again, or calibrate and freeze."
        )
