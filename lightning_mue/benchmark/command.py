"""``mue benchmark``: a bundle on its user's own data."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

from lightning_mue.backbones.processor import Processor
from lightning_mue.benchmark.exam import Exam
from lightning_mue.benchmark.machine import hardware, today, versions
from lightning_mue.benchmark.run import Benchmark, Settings, benchmark
from lightning_mue.benchmark.table import markdown, print_main
from lightning_mue.data import ShardsDataModule
from lightning_mue.export import load
from lightning_mue.files import write_text
from lightning_mue.inference import ExitEngine
from lightning_mue.policy import ExitPolicy


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number from 1, got {text!r}")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("bundle", help="folder made by `mue freeze`")
    parser.add_argument(
        "-c", "--config", help="recipe whose `data` describe the test data (and those to tune methods on)"
    )
    parser.add_argument("--data", help="shards: a folder, a tar or a glob; the recipe's if not given")
    parser.add_argument("--task", help="vqa, statement, match, caption, reading or document; the recipe's if not given")
    parser.add_argument("--metric", help="scores answers; the promise's if not given")
    parser.add_argument(
        "--timed-samples", type=_positive, default=60, help="answered by every line in turn; quality takes all"
    )
    parser.add_argument("--repeats", type=_positive, default=3, help="of the timing")
    parser.add_argument("--batch", type=_positive, help="time batches of this size too, beside single samples")
    parser.add_argument("--runtime", help="of the exits: torch, onnxruntime or auto; the policy's if not given")
    parser.add_argument("--threads", type=_positive, help="of the CPU; the recipe's if not given")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--methods", action="store_true", help="the exit methods of the papers too, tuned alike")
    parser.add_argument("--compiled", action="store_true", help="transformers' compiled model too; takes minutes")
    parser.add_argument("--out", default="benchmark.md", help="the page; the figures go beside it, as JSON")


def run(args: argparse.Namespace) -> Path:
    """Measure, print, and write the page and its figures; return the page.

    Raises:
        ValueError: bundle, recipe, metric or batch size do not fit.
    """
    target, recipe = Path(args.out), _recipe(args.config)
    if target.suffix == ".json":
        raise ValueError(f"`--out` is the page, beside which the figures go as .json; got {args.out!r}")
    if (threads := args.threads or recipe.get("threads")) is not None:
        torch.set_num_threads(threads)
    engine = load(args.bundle, args.device, args.runtime)
    if not isinstance(engine, ExitEngine):
        raise ValueError(f"{args.bundle} holds graphs, and no model to compare them with; give one frozen as a model")
    policy, data = engine.policy, _data(args, recipe.get("data") or {}, engine.processor)
    data.setup("test")
    metric = args.metric or _metric(policy)
    kept = policy.certificate.decode.get("max_new_tokens") if policy.certificate is not None else None
    exam = Exam.of(engine.original, data, metric, kept)
    sizes = (1,) if args.batch in (None, 1) else (1, args.batch)
    settings = Settings(args.timed_samples, args.repeats, sizes, args.runtime, args.methods, args.compiled)
    found = benchmark(exam, policy, settings)
    facts = _facts(args, policy, found, data)
    quality, title = metric.replace("_", " "), f"Benchmark of {Path(args.bundle).resolve().name}"
    write_text(target, markdown(found, title, facts, quality))
    figures = {"title": title, "facts": facts, "settings": asdict(settings), "metric": metric, **_figures(found)}
    write_text(target.with_suffix(".json"), json.dumps(figures, indent=1) + "\n")
    print_main(found, title, quality)
    print(f"\n{target}\n{target.with_suffix('.json')}")
    return target


def _recipe(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} must be a recipe in YAML: {error}") from error
    if not isinstance(recipe, dict) or not isinstance(recipe.get("data"), dict):
        raise ValueError(f"{path} must be a recipe with `data`, as `mue fit` takes it")
    return recipe


def _data(args: argparse.Namespace, settings: dict[str, Any], processor: Processor | None) -> ShardsDataModule:
    """Return the data of the recipe or of the options, for the bundle's own processor."""
    if processor is None:
        raise ValueError(f"{args.bundle} has no processor, so it takes no pictures; freeze it with one")
    if args.data is not None:
        # A folder has shards of all splits; one tar or a glob is the test data.
        test = None if Path(args.data).expanduser().is_dir() else args.data
        settings = settings | {"train": args.data, "val": None, "test": test}
    settings |= {"task": args.task} if args.task is not None else {}
    if missing := [f"--{name}" for name, key in (("data", "train"), ("task", "task")) if not settings.get(key)]:
        raise ValueError(f"give the recipe that the bundle was trained with (-c FILE), or {' and '.join(missing)}")
    try:
        data = ShardsDataModule(**settings)
    except TypeError as error:
        raise ValueError(f"`data` of {args.config} must be settings of ShardsDataModule: {error}") from error
    data.__dict__["processor"] = processor  # in place of the one that it would build
    return data


def _metric(policy: ExitPolicy) -> str:
    promised = policy.certificate.metric if policy.certificate is not None else None
    if promised in (None, "consistency", "bleu"):
        raise ValueError(f"the policy's promise ({promised}) names no score of a single answer; give --metric")
    return str(promised)


def _facts(args: argparse.Namespace, policy: ExitPolicy, found: Benchmark, data: ShardsDataModule) -> dict[str, str]:
    """Return what a reader needs to repeat the numbers; no name of a host, no folder."""
    own = data.hparams["test"] is not None or data.has_test_shards
    seen = "" if own or data.hparams["holdout"] else " of the validation shards, which training and calibration saw too"
    promise = policy.certificate.in_words() if policy.certificate else "No certificate: this policy was not calibrated."
    repeats = f"{args.repeats} repeats of {args.timed_samples} samples at most"
    return {
        "device": hardware(torch.device(args.device)),
        "threads": str(torch.get_num_threads()),
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
        "date": today(),
        "quality": f"all {found.samples} test samples{seen}",
        "time": repeats,
        "policy": f"{policy.depths_in_words()}. {promise}",
    }


def _figures(found: Benchmark) -> dict[str, Any]:
    return {
        "own full depth": found.full,
        "batches": {size: [entry.to_dict() for entry in entries] for size, entries in found.entries.items()},
        "machine": found.machine,
        "left out": dict(found.left_out),
        "note": found.note,
    }


def main(parser: argparse.ArgumentParser, args: Sequence[str]) -> None:
    """Run the command as it was typed."""
    add_arguments(parser)
    run(parser.parse_args(args))
