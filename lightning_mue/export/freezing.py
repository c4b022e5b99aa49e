"""Freezing: from a model and its policy to a bundle."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn

from lightning_mue.backbones import fingerprint, view
from lightning_mue.backbones.processor import Processor
from lightning_mue.exits import attached
from lightning_mue.export.card import model_card
from lightning_mue.export.graph_bundle import save_graphs
from lightning_mue.export.manifest import foreign_files, is_bundle, write_manifest
from lightning_mue.export.model_file import check_own_weights, load_files, read_config, save_files
from lightning_mue.export.single_file import check_plain, export_graphs
from lightning_mue.inference.check import check_policy, check_text_policy, leave_both_early
from lightning_mue.inference.sessions import check_installed
from lightning_mue.policy import ExitPolicy
from lightning_mue.policy_file import EMBED_POLICY, EMBED_TEXT_POLICY
from lightning_mue.portable.names import POLICY, PROCESSOR

SINGLE_FILE = "single_file"
"""Folder of the streams before the decoder, each as one graph."""


def freeze(
    model: nn.Module,
    policy: ExitPolicy,
    folder: str | os.PathLike[str],
    processor: Any = None,
    table: str | None = None,
    runtime: str | None = None,
    graphs: bool = False,
    embed_policy: ExitPolicy | None = None,
    embed_text_policy: ExitPolicy | None = None,
) -> Path:
    """Write a bundle: weights, config, policy, processor and model card; the same inputs give the same bytes.

    The folder appears complete or not at all: it is written aside, read back and renamed.

    With ``runtime="onnxruntime"`` it holds the model as graphs, from pixels to tokens, instead of modules and their
    weights. It then answers where onnxruntime, numpy, tokenizers and Pillow are all that is installed.

    Args:
        model: a supported backbone, with exits attached if the policy needs them; it stays as it is.
        policy: what the bundle obeys. Its fingerprint must be the model's; None is filled in.
        folder: where to; a bundle that lies there is replaced, anything else is refused.
        processor: a Processor, or a transformers processor; without one the bundle takes and gives tensors.
        table: a comparison for the model card, as Markdown (``lightning_mue.report.table_markdown``).
        runtime: ``onnxruntime`` for graphs, which need a processor (``[ort]`` must be installed to write them); if not
            given, the bundle runs in any runtime where torch is.
        graphs: also write what runs before the decoder as single files for other programs (`export_graphs`), into
            the bundle's folder ``single_file``; needs a processor.
        embed_policy: what embeddings obey (CalibrateEmbeddings), of a model that compares pictures with texts; that of
            answers if not given. Not for graphs, which do not embed.
        embed_text_policy: what texts obey when they are embedded (``CalibrateEmbeddings(query="text")``); that of other
            embeddings if not given. Likewise.

    Returns:
        The folder.

    Raises:
        ValueError: a policy does not fit the model, or the folder holds something else than a bundle.
        TypeError: the model has no view, or the processor cannot be saved.
        ImportError: graphs are asked for, and onnx, onnxscript or onnxruntime is not installed.
    """
    processor = None if processor is None else _as_processor(processor)
    if graphs and processor is None:
        raise ValueError("`graphs` needs a processor, which says how large pictures are; `export_graphs` takes inputs")
    if graphs:
        check_plain(model, policy)
        check_installed()
    embeds = {EMBED_POLICY: embed_policy, EMBED_TEXT_POLICY: embed_text_policy}
    if runtime is not None and any(embeds.values()):
        raise ValueError(
            "A bundle of graphs does not embed; leave `embed_policy` and `embed_text_policy` out, or `runtime`."
        )
    target = Path(folder).resolve()  # a link keeps pointing to what is replaced
    _check_target(target)
    backbone = view(model)
    check_own_weights(model)
    found = fingerprint(model)
    policy = _of_model(policy, model, found)
    with _written_aside(target) as aside:
        policy.save(aside / POLICY)
        embeds = {name: one and _of_model(one, model, found, name) for name, one in embeds.items()}
        for name, one in embeds.items():
            if one is not None:
                one.save(aside / name)
        if processor is not None:
            processor.save(aside / PROCESSOR)
        facts = (processor is not None, runtime is not None, "input_ids" in backbone.generate_inputs)
        pictures, texts = embeds[EMBED_POLICY], embeds[EMBED_TEXT_POLICY]
        both_early = leave_both_early(pictures or policy, texts or pictures or policy, backbone)
        card = model_card(policy, target.name, table, *facts, pictures, texts, both_early)
        (aside / "README.md").write_text(card, "utf-8")
        if runtime is None:
            save_files(model, aside, found)
            _check_readable(aside)
        else:
            save_graphs(model, policy, processor, aside, runtime)
        if graphs:
            assert processor is not None
            export_graphs(model, policy, aside / SINGLE_FILE, processor([Image.new("RGB", (32, 32))], ["a"]))
        write_manifest(aside)
    return Path(folder)


def _of_model(policy: ExitPolicy, model: nn.Module, found: str, name: str = POLICY) -> ExitPolicy:
    """Return the policy with the model's fingerprint, ``found``, after looking whether it is of this model."""
    backbone = view(model)
    if name != POLICY and backbone.contrastive is None:
        raise ValueError(
            f"`{Path(name).stem}` is for models that compare pictures with texts; {type(model).__name__} does not"
        )
    check_policy(policy, backbone, attached(model), embeds=name != POLICY)
    if name == EMBED_TEXT_POLICY:
        check_text_policy(policy, backbone)
    if policy.fingerprint not in (None, found):
        raise ValueError(
            f"The policy was calibrated for weights with fingerprint {policy.fingerprint}, this model has {found}; "
            "calibrate again."
        )
    return replace(policy, fingerprint=found)


def _as_processor(processor: Any) -> Processor:
    if isinstance(processor, Processor):
        return processor
    if hasattr(processor, "save_pretrained"):
        return Processor(processor)
    raise TypeError(
        f"`processor` must be a lightning_mue Processor or a transformers processor, got {type(processor).__name__}"
    )


def _check_readable(aside: Path) -> None:
    """Read the model back: a config that does not describe it must fail here, not where the bundle is used."""
    try:
        load_files(aside, read_config(aside))
    except ValueError as error:
        raise ValueError(
            f"The model is not the one its own config describes, so it cannot be rebuilt from a bundle: {error}"
        ) from error


def _check_target(target: Path) -> None:
    if not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir())):
        return
    if not target.is_dir() or not is_bundle(target):
        raise ValueError(f"{target} exists and is not a bundle; it is left as it is. Name another folder.")
    if foreign := foreign_files(target):
        raise ValueError(
            f"{target} is a bundle that also holds {foreign[0]!r}, which replacing it would delete. "
            "Move it away or name another folder."
        )


@contextmanager
def _written_aside(target: Path) -> Iterator[Path]:
    """Give a new folder beside ``target`` that becomes ``target`` if the block succeeds, and vanishes if not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside, old = (target.with_name(f".{target.name}.{what}.{os.getpid()}") for what in ("new", "old"))
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        if target.exists():
            target.rename(old)  # a folder cannot be renamed onto a full one
        try:
            aside.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
