"""``mue quickstart``: the whole life cycle on built-in data, by the same commands that a user types."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lightning_mue.backbones import num_layers, view
from lightning_mue.callbacks import CalibrateExits
from lightning_mue.callbacks.batches import on_device
from lightning_mue.data.scenes import SceneMix, write_scenes
from lightning_mue.data.tasks import Sample
from lightning_mue.export import freeze, load
from lightning_mue.inference import ExitEngine
from lightning_mue.inference.profile import device_name
from lightning_mue.lightning_cli import MueCLI, run
from lightning_mue.methods import in_words
from lightning_mue.metrics.answers import score
from lightning_mue.policy import ExitPolicy
from lightning_mue.report import ShownAnswer, print_table, split_text, table_markdown, write_html
from lightning_mue.side_by_side import SideBySide, side_by_side

PICTURES = {"train": 9_000, "val": 2_000, "test": 400}

# What two minutes on one core can learn, from one shape to lists of up to four. Training sees many questions on each
# picture; calibration and test see two, for questions on one picture count as one cluster.
TRAIN_MIX = SceneMix(
    objects={1: 2, 2: 3, 3: 3, 4: 1}, levels={1: 1, 2: 3, 3: 2, 5: 1.5}, questions_per_scene=6, curtains=0.0
)
SIZE = 24  # pixels a side: a cell is one patch of the model
EVAL_MIX = replace(TRAIN_MIX, questions_per_scene=2)
TIMED_SAMPLES = 40
SHOWN = 8  # pictures in the report


def quickstart(out: Path, keep: float, seed: int, steps: int | None, methods: bool = False) -> None:
    """Train, collect, calibrate, freeze, load, generate and compare; leave a bundle and ``report.html`` in ``out``.

    An interrupted run goes on where it was when it is called again.

    Args:
        out: folder for everything.
        keep: fraction of full-depth quality to keep.
        seed: of data and training.
        steps: training steps; the recipe's if None.
        methods: compare with the methods of the literature too.
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
    _finish(console, say, out, cli, calibration, {"seed": seed, "keep": keep}, methods)
    say("done")


def _finish(
    console: Console,
    say: Callable[[str], None],
    out: Path,
    cli: MueCLI,
    calibration: CalibrateExits,
    settings: dict[str, Any],
    methods: bool,
) -> None:
    """Freeze, load, compare, report."""
    policy, model, datamodule = calibration.policy, cli.model.model, cli.datamodule
    assert policy is not None
    datamodule.setup("test")
    say("comparing: every variant answers the same unseen pictures in turn")
    measured: SideBySide = side_by_side(model, policy, datamodule, calibration.metric, TIMED_SAMPLES, methods=methods)
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
        pictures=_shown(model, policy, datamodule, calibration.metric),
        note=measured.note,
        settings=settings
        | _settings(model, calibration, datamodule)
        | {name: in_words(found) for name, found in measured.methods.items()},
    )
    print_table(measured.rows, policy.certificate, "scenes: unseen pictures, batch 1, end to end", console=console)
    console.print(f"\nbundle  {bundle}\nreport  {page}\n", highlight=False)


def _shown(model: Any, policy: ExitPolicy, datamodule: Any, metric: str) -> list[ShownAnswer]:
    """Answer for a few test pictures of all levels, to be shown with the depth of every token."""
    engine = ExitEngine(model, policy, check_fingerprint=False)
    store, processor = datamodule.test_samples, datamodule.processor
    end_ids = engine.backbone.decode_settings(None).end_ids
    shown = []
    for index in spread(store.samples, SHOWN):
        sample = store.load(index)
        inputs = on_device(processor([sample.image], [sample.prompt]), model)
        output = engine.generate(None, datamodule.answer_constraint(end_ids[0]), **inputs)
        depths = [k for k in output.exit_depths["decoder"][0].tolist() if k]
        tokens = output.sequences[0, 1 : len(depths) + 1].tolist()
        words = tokens[:-1] if tokens[-1] in end_ids else tokens
        pieces = split_text(lambda ids: processor.decode(torch.tensor([ids], dtype=torch.long))[0], words)
        is_right = score(metric, "".join(pieces), sample.references) == 1
        before = {stream: int(depth[0]) for stream, depth in output.exit_depths.items() if stream != "decoder"}
        shown.append(
            ShownAnswer(sample.image, sample.prompt, sample.references, pieces, depths, is_right, sample.level, before)
        )
    return shown


def spread(samples: Sequence[Sample], count: int) -> list[int]:
    """Return the indices of ``count`` samples, easy ones first: of each level in turn the first with a new picture."""
    waiting = {level: [i for i, s in enumerate(samples) if s.level == level] for level in {s.level for s in samples}}
    chosen: dict[str, int] = {}  # picture -> index
    while len(chosen) < count and any(waiting.values()):
        for level in sorted(waiting):
            waiting[level] = [i for i in waiting[level] if samples[i].cluster not in chosen]
            if waiting[level] and len(chosen) < count:
                index = waiting[level].pop(0)
                chosen[samples[index].cluster] = index
    return sorted(chosen.values(), key=lambda i: (samples[i].level, i))


def _settings(model: Any, calibration: CalibrateExits, datamodule: Any) -> dict[str, Any]:
    """Return what a reader needs to repeat the numbers; no name of a host."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "lightning")}
    return {
        "device": device_name(next(model.parameters()).device),
        "threads": torch.get_num_threads(),
        "propose samples": len(calibration.trace) if calibration.trace is not None else 0,
        "test samples": len(datamodule.test_samples),
        "pictures shown": "of each level the first in the test data",
        **versions,
    }


def _steps(console: Console, begin: float) -> Callable[[str], None]:
    def say(text: str) -> None:
        console.rule(f"[bold]{text}[/bold]  [dim]{time.perf_counter() - begin:.0f} s[/dim]", align="left")

    return say
