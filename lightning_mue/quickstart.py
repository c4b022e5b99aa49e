"""``mue quickstart``: the whole life cycle on built-in data, by the same commands that a user types."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lightning_mue.backbones import num_layers, view
from lightning_mue.callbacks import CalibrateExits
from lightning_mue.data.scenes import SceneMix, write_scenes
from lightning_mue.export import freeze, load
from lightning_mue.inference.profile import device_name
from lightning_mue.lightning_cli import MueCLI, run
from lightning_mue.report import print_table, table_markdown, write_html
from lightning_mue.side_by_side import SideBySide, side_by_side

PICTURES = {"train": 9_000, "val": 2_000, "test": 400}

# What two minutes on one core can learn, from one shape to lists of up to four. Training sees many questions on each
# picture; calibration and test see two, for questions on one picture count as one cluster.
TRAIN_MIX = SceneMix(
    objects={1: 2, 2: 3, 3: 3, 4: 1}, levels={1: 1, 2: 3, 3: 2, 5: 1.5}, questions_per_scene=6, curtains=0.0
)
SIZE = 24  # pixels a side: a cell is one patch of the model
EVAL_MIX = replace(TRAIN_MIX, questions_per_scene=2)


def quickstart(out: Path, keep: float, seed: int, steps: int | None) -> None:
    """Train, collect, calibrate, freeze, load, generate and compare; leave a bundle and ``report.html`` in ``out``.

    An interrupted run goes on where it was when it is called again.

    Args:
        out: folder for everything.
        keep: fraction of full-depth quality to keep.
        seed: of data and training.
        steps: training steps; the recipe's if None.
    """
    console = Console()
    begin = time.perf_counter()
    say = _steps(console, begin)
    say("Drawing scenes: pictures from one shape to crowded ones, with questions from easy to hard")
    shards = out / "scenes"
    for split, count in PICTURES.items():
        write_scenes(shards, count, seed, split, SIZE, mix=TRAIN_MIX if split == "train" else EVAL_MIX)
    recipe = str(resources.files("lightning_mue.recipes") / "quickstart.yaml")
    common = ["-c", recipe, "--data.train", str(shards), "--data.test", str(shards)]
    common += ["--trainer.default_root_dir", str(out), "--seed_everything", str(seed)]
    limit = [] if steps is None else ["--trainer.max_steps", str(steps)]
    say("mue fit: training a small Florence-2 with exits in vision tower, encoder and decoder")
    run(["fit", *common, *limit])
    say(f"mue calibrate: thresholds that keep {keep:.1%} of full-depth quality")
    cli = run(["calibrate", *common, "--ckpt_path", str(out / "last.ckpt"), "--keep", str(keep)])
    calibration = next(c for c in cli.trainer.callbacks if isinstance(c, CalibrateExits))  # type: ignore[attr-defined]
    _finish(console, say, out, cli, calibration, {"seed": seed, "keep": keep})
    say("done")


def _finish(
    console: Console,
    say: Callable[[str], None],
    out: Path,
    cli: MueCLI,
    calibration: CalibrateExits,
    settings: dict[str, Any],
) -> None:
    """Freeze, load, compare, report."""
    policy, model, datamodule = calibration.policy, cli.model.model, cli.datamodule
    assert policy is not None
    datamodule.setup("test")
    say("comparing: every variant answers the same unseen pictures in turn")
    measured: SideBySide = side_by_side(model, policy, datamodule, calibration.metric, timed_samples=40)
    table = table_markdown(measured.rows, calibration.metric.replace("_", " "))
    say("mue freeze, mue.load, mue generate: the bundle answers for one picture")
    bundle = freeze(model, policy, out / "bundle", datamodule.processor, table)
    sample = datamodule.test_samples.load(0)
    answer = load(bundle).answer([sample.image], [sample.prompt])[0]
    console.print(f"  {sample.prompt!r} -> {answer!r} (reference {sample.references[0]!r})", highlight=False)
    page = write_html(
        out / "report.html",
        "Early exit on scenes",
        measured.rows,
        policy,
        proposal=calibration.proposal,
        tests=calibration.tests,
        depths=measured.depths,
        num_layers=num_layers(view(model)),
        levels=measured.levels,
        ceiling=measured.ceiling,
        settings=settings | _settings(model, calibration, datamodule),
    )
    print_table(measured.rows, policy.certificate, "scenes: unseen pictures, batch 1, end to end", console=console)
    console.print(f"\nbundle  {bundle}\nreport  {page}\n", highlight=False)


def _settings(model: Any, calibration: CalibrateExits, datamodule: Any) -> dict[str, Any]:
    """Return what a reader needs to repeat the numbers; no name of a host."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "lightning")}
    return {
        "device": device_name(next(model.parameters()).device),
        "threads": torch.get_num_threads(),
        "propose samples": len(calibration.trace) if calibration.trace is not None else 0,
        "test samples": len(datamodule.test_samples),
        **versions,
    }


def _steps(console: Console, begin: float) -> Callable[[str], None]:
    def say(text: str) -> None:
        console.rule(f"[bold]{text}[/bold]  [dim]{time.perf_counter() - begin:.0f} s[/dim]", align="left")

    return say
