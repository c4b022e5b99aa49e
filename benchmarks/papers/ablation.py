"""What each training flag is worth: the same recipe trained again and again, one flag changed at a time.

    python -m papers.ablation --recipe ../recipes/quickstart.yaml --data SHARDS --name scenes --runs RUNS

(from the folder ``benchmarks``). Every variant sees the same batches for the same number of steps. A variant whose
checkpoint is in ``--runs`` already is not trained again, so an interrupted run goes on where it was. With
``--ckpt_path`` each variant goes on from a trained model instead of beginning anew.
Writes ``benchmarks/results/ablation_<name>_<date>.md``.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from papers.signals import auroc, depth_at, rows
from rich.progress import track
from runs import load_run
from targets import device, today

from lightning_mue.answers import answer
from lightning_mue.backbones import view
from lightning_mue.files import write_text
from lightning_mue.inference.record import record
from lightning_mue.lightning_cli import run
from lightning_mue.metrics import scorer
from lightning_mue.policy import ExitPolicy, ExitRule
from lightning_mue.side_by_side import first_exits
from lightning_mue.trace import Trace

VARIANTS: dict[str, dict[str, Any]] = {
    "as the recipe": {},
    "plain: last exit only, full streams": {
        "exits.decoder": "[]",
        "exits.shortlist": 0,
        "early_probability": 0.0,
        "own_path": 0.0,
    },
    "sum (MuE)": {"weighting": "sum"},
    "linear, depth-rising (CALM)": {"weighting": "linear"},
    "distilled, weight 0.5": {"distill": 0.5},
    "no sampled stream depths": {"early_probability": 0.0},
    "stream depths sampled from the start": {"early_after": 0.0},
    "no adapters": {"exits.adapter": "none"},
    "linear adapters": {"exits.adapter": "linear"},
    "gates without class balance": {"gate_balance": False},
    "gates at a tenth of their rate": {"gate_learning_rate": 3e-4},
    "gates on references alone": {"own_path": 0.0},
    "gates on own path, 25 % of steps": {"own_path": 0.25},
    "gates see no shortlist": {"exits.shortlist": 0},
    "gates see a shortlist of 64": {"exits.shortlist": 64},
    "shortlist and own path": {"exits.shortlist": 64, "own_path": 0.25},
    "copy-aware, 25 % of steps": {"propagate": 0.25},
    "gates alone, own path 50 %": {"learns": "gates", "own_path": 0.5, "early_after": 0.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--data", required=True, help="folder of the shards")
    parser.add_argument("--name", required=True)
    parser.add_argument("--runs", required=True, help="folder for the checkpoints")
    parser.add_argument("--metric", default="exact_match")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--ckpt_path", help="begin with these weights")
    parser.add_argument("--only", nargs="*", help="names of variants")
    parser.add_argument("--also", nargs="*", default=[], help="flags of all variants: exits.shortlist=64")
    parser.add_argument("--test-batches", type=int, default=None)
    args = parser.parse_args()
    lines = []
    for name, flags in VARIANTS.items():
        if args.only and name not in args.only:
            continue
        checkpoint, seconds = _train(name, flags, args)
        lines.append(_line(name, str(checkpoint), seconds, args))
        _write(lines, args)


def _train(name: str, flags: dict[str, Any], args: argparse.Namespace) -> tuple[Path, float | None]:
    folder = Path(args.runs) / "".join(c if c.isalnum() else "_" for c in name)
    given = ["-c", args.recipe, "--data.train", args.data, "--trainer.default_root_dir", str(folder)]
    given += ["--trainer.max_steps", str(args.steps), "--trainer.max_epochs", "1000"]
    given += [] if args.ckpt_path is None else ["--model.init_from", args.ckpt_path]
    common = dict(flag.split("=", 1) for flag in args.also)
    given += [f"--model.{flag}={value}" for flag, value in (common | flags).items()]
    if (done := folder / "done.json").exists():
        made = json.loads(done.read_text())
        if made["given"] == given:
            return folder / "last.ckpt", made["seconds"]
        raise SystemExit(f"{folder} holds a run of other settings; give another `--runs`")
    begin = time.process_time()
    run(["fit", *given])
    seconds = time.process_time() - begin
    write_text(done, json.dumps({"given": given, "seconds": seconds}))
    return folder / "last.ckpt", seconds


HEADER = (
    "| variant | full depth | static 1 | static 2 | all first | K/V propagated, margin 0.9 | gate AUROC, exit 1 | "
    "margin AUROC, exit 1 | depth at 98 % agreement: gate | margin | stream gates AUROC | CPU s |\n"
    "| --- |" + " --- |" * 11
)


def _line(name: str, checkpoint: str, seconds: float | None, args: argparse.Namespace) -> str:
    module, data = load_run(checkpoint, train=args.data)
    data.setup("test")
    model, score = module.model, scorer(args.metric)
    batches = list(data.test_dataloader())[: args.test_batches]
    full = answer(model, ExitPolicy.full_depth(), batches, data, score).quality
    decoder = module.exits.layers.get("decoder", ())
    if not decoder:
        return f"| {name} | {full:.4f} |" + " - |" * 9 + f" {seconds:.0f} |"
    static = [
        answer(model, ExitPolicy({"decoder": ExitRule.static(k)}), batches, data, score).quality for k in decoder[:2]
    ]
    first = answer(model, first_exits(model), batches, data, score).quality
    copied = ExitPolicy({"decoder": ExitRule("margin", decoder, (0.9,) * len(decoder))}, kv_fill="propagate")
    copied_quality = answer(model, copied, batches, data, score).quality
    prefix = data.answer_constraint(view(model).decode_settings(None).end_ids[0])
    parts = [record(model, b, b["sample_id"], b["cluster"], lambda s: {}, None, prefix) for b in track(batches, name)]
    trace = Trace.merge(parts)
    of_tokens, harmless = rows(trace, trace.streams["decoder"])
    at_first = [auroc(of_tokens[s][:, 0], harmless[:, 0]) for s in ("gate", "margin")]
    depths = [depth_at(trace.streams["decoder"], of_tokens[s], harmless, 0.98) for s in ("gate", "margin")]
    others = {n: s for n, s in trace.streams.items() if n != "decoder"}
    gates = [auroc(s.scores["gate"][:, e], s.same_at[:, e]) for s in others.values() for e in range(len(s.layers))]
    figures = [full, *static, first, copied_quality, *at_first, *depths, float(np.nanmean(gates))]
    return f"| {name} | " + " | ".join(f"{x:.3f}" for x in figures) + f" | {seconds:.0f} |"


def _write(lines: list[str], args: argparse.Namespace) -> None:
    start = "from random weights" if args.ckpt_path is None else "from one trained model"
    text = (
        f"# {args.name}: training flags, one at a time\n\n{device()}, 1 thread, torch {torch.__version__}; {today()}. "
        f"{args.steps} steps {start}{', all with ' + ' '.join(args.also) if args.also else ''}, seed 0; {args.metric} "
        f"{'on the test data' if args.test_batches is None else f'on {args.test_batches} batches of the test data'}. "
        f"One run each: differences of a point or two may be luck.\n\n{HEADER}\n" + "\n".join(lines) + "\n"
    )
    write_text(Path(__file__).parents[1] / "results" / f"ablation_{args.name}_{today()}.md", text)
    print(lines[-1])


if __name__ == "__main__":
    main()
