"""One table per task: every method of the papers over the same model, engine and data, in one interleaved run.

    python -m papers.compare --ckpt_path runs/sroie_lines/last.ckpt --name sroie_lines --metric exact_text

(from the folder ``benchmarks``). Each method's setting is the boldest that keeps ``--keep`` of full-depth quality on
the recipe's calibration data, decoded for real; quality is then measured on its test data, time on some of that, at
batch 1.
Writes ``benchmarks/results/papers_<name>_<date>.md`` and, for the report, the same as JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from papers.answers import Answers, Batch, answer, interval, oracle_depths, plain_answers
from rich.progress import Progress
from runs import load_run
from targets import device, today

from lightning_mue.backbones import num_layers, view
from lightning_mue.calibration import propose
from lightning_mue.callbacks.batches import single
from lightning_mue.exits import attached
from lightning_mue.files import write_text
from lightning_mue.inference import ExitEngine
from lightning_mue.inference.compare import Timing, Variant, compare, engine_variant, transformers_variant
from lightning_mue.inference.profile import measure_latency
from lightning_mue.inference.record import record
from lightning_mue.methods import STATIC, boldest, families, in_words, kv_modes
from lightning_mue.metrics import DocumentFrequencies, scorer
from lightning_mue.policy import ExitPolicy, ExitRule
from lightning_mue.side_by_side import FIRST, FULL, PLAIN, first_exits
from lightning_mue.trace import Trace

OURS = "calibrated exits"
ORACLE = "decoder oracle: first exit that agrees"
IDEAL = "calibrated exits' decoder depths, K/V copied, no signal"


@dataclass
class Entry:
    """A line of the table: a policy, or known depths replayed under one."""

    policy: ExitPolicy
    answers: Answers
    forced: list[Any] | None = None
    note: str = ""
    timing: Timing | None = None
    parts: dict[str, float] | None = None


def main() -> None:
    args = _arguments()
    if Path(args.ckpt_path).name.startswith("best"):
        raise SystemExit("Give last.ckpt: best.ckpt was chosen on data that may be the test data here.")
    torch.set_num_threads(args.threads)
    changed: dict[str, Any] = {} if args.data is None else {"train": args.data}
    changed["calibration_limit"] = args.tuning_samples  # whole sources, chosen by hash
    module, data = load_run(args.ckpt_path, **changed)
    data.setup("test")
    model, layers = module.model, {k: list(v) for k, v in module.exits.layers.items()}
    test = list(data.test_dataloader())
    tuning = list(data.val_dataloader())
    score = _scorer(args.metric, test, tuning)
    with Progress() as bars:
        entries = _entries(model, layers, args, data, tuning, test, score, bars)
        _time(model, entries, args, data, test, score, bars)
    write(args, entries, data, layers, num_layers(view(model)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt_path", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--data", help="the shards, if they lie elsewhere than in training")
    parser.add_argument("--metric", default="exact_match")
    parser.add_argument("--keep", type=float, default=0.98)
    parser.add_argument("--tuning-samples", type=int, default=None, help="at most; all calibration data if not given")
    parser.add_argument("--timed-samples", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kv-modes", action="store_true", help="compare K/V modes instead of methods")
    return parser.parse_args()


def _scorer(metric: str, test: list[Any], tuning: list[Any]) -> Callable[[str, Any], float]:
    references = [refs for batch in (*test, *tuning) for refs in batch["references"]]
    return scorer(metric, DocumentFrequencies.from_references(references) if metric == "cider" else None)


def _entries(
    model: Any, layers: dict, args: argparse.Namespace, data: Any, tuning: list, test: list, score: Any, bars: Progress
) -> dict[str, Entry]:
    """Tune every method and decode the test data with it."""
    full_tuned = answer(model, ExitPolicy.full_depth(), tuning, data, score)
    decode = partial(answer, model, batches=test, data=data, score=score)
    if args.kv_modes:
        methods = kv_modes(layers["decoder"], "margin")
    else:
        steps, gates = view(model).decode_settings(None).max_new_tokens, attached(model).config.gate
        methods = families(layers, num_layers(view(model)), steps, gates)
        methods[OURS] = _proposed(model, args, data, tuning, score)
    entries = {FULL: Entry(ExitPolicy.full_depth(), decode(ExitPolicy.full_depth()))}
    bar = bars.add_task("methods", total=len(methods) + len(layers["decoder"]))
    for k in layers["decoder"]:
        policy = ExitPolicy({"decoder": ExitRule.static(k)})
        entries[f"{STATIC} {k}"] = Entry(policy, decode(policy))
        bars.advance(bar)
    entries[FIRST] = Entry(first_exits(model), decode(first_exits(model)))
    for name, family in methods.items():
        found = boldest(family, lambda p: answer(model, p, tuning, data, score).quality, args.keep * full_tuned.quality)
        if name == STATIC:
            best = f"{STATIC} {found.rules['decoder'].layers[0]}" if found else FULL
            entries[best].note = f"the static depth that kept {args.keep:.0%} on the tuning data"
        elif family:
            note = "" if found else f"its safest setting, which kept less than {args.keep:.0%} on the tuning data"
            policy = found or family[0]
            entries[name] = Entry(policy, decode(policy), note=note)
        bars.advance(bar)
    if not args.kv_modes:
        entries |= _lower_bounds(model, layers, entries, test, data, score)
    return entries


def _proposed(model: Any, args: argparse.Namespace, data: Any, tuning: list, score: Any) -> list[ExitPolicy]:
    """Return the calibrator's chain for the tuning data."""
    metric = "consistency" if args.metric == "cider" else args.metric

    def scores_of(batch: Batch, sequences: torch.Tensor) -> list[float]:
        texts = data.processor.decode(sequences[:, 1:])
        return [score(text, refs) for text, refs in zip(texts, batch["references"], strict=True)]

    parts = []
    for batch in tuning:
        end_id = view(model).decode_settings(None).end_ids[0]
        parts.append(
            record(
                model,
                batch,
                batch["sample_id"],
                batch["cluster"],
                partial(scores_of, batch),
                None,
                data.answer_constraint(end_id),
            )
        )
    latency = measure_latency(model, single(tuning[0], 0))
    return [c.policy for c in propose(Trace.merge(parts), latency, metric, args.keep, 0.95).chain]


def _lower_bounds(model: Any, layers: dict, entries: dict, test: list, data: Any, score: Any) -> dict[str, Entry]:
    """Replay the oracle's depths, and the calibrated exits' without asking a signal and without catching up.

    The second shows what the same depths would cost if upkeep were a copy; with other K/V its tokens may differ.
    """
    oracle = oracle_depths(model, test, data, layers["decoder"])
    full = ExitPolicy.full_depth()
    found = {ORACLE: Entry(full, answer(model, full, test, data, score, oracle), oracle)}
    if OURS in entries:
        ours = entries[OURS]
        others = {s: r for s, r in ours.policy.rules.items() if s != "decoder"}
        free, depths = ExitPolicy(others, kv_fill="copy"), ours.answers.by_row
        found[IDEAL] = Entry(free, answer(model, free, test, data, score, depths), depths)
    return found


def _time(model: Any, entries: dict[str, Entry], args: Any, data: Any, test: list, score: Any, bars: Progress) -> None:
    """Time all entries in turn on the same single samples; then, apart, where each one's time goes."""
    places = [(b, r) for b, batch in enumerate(test) for r in range(len(batch["sample_id"]))]
    chosen = [places[i] for i in np.unique(np.linspace(0, len(places) - 1, args.timed_samples).astype(int))]
    samples = [single(test[b], r) | {"place": (b, r)} for b, r in chosen]
    prefix = data.answer_constraint(view(model).decode_settings(None).end_ids[0])
    variants: dict[str, Variant] = {PLAIN: transformers_variant(model, None, prefix)}
    engines = {name: ExitEngine(model, e.policy, check_fingerprint=False) for name, e in entries.items()}
    for name, entry in entries.items():
        variants[name] = _variant(engines[name], entry.forced, prefix)
    bar = bars.add_task("time", total=len(samples) * args.repeats)
    timings = compare(variants, samples, args.repeats, baseline=FULL, on_done=lambda *_: bars.advance(bar))
    plain = np.array(plain_answers(variants[PLAIN], test, data, score))
    entries[PLAIN] = Entry(ExitPolicy.full_depth(), replace(entries[FULL].answers, scores=plain))
    for name, timing in timings.items():
        entries[name].timing = timing
    for name, engine in engines.items():
        entries[name].parts = _parts(engine, entries[name].forced, samples, prefix)


def _variant(engine: ExitEngine, forced: list[Any] | None, prefix: Any) -> Variant:
    if forced is None:
        return engine_variant(engine, None, prefix)

    @torch.inference_mode()
    def replay(inputs: dict[str, Any]) -> torch.Tensor:
        b, r = inputs["place"]
        return engine.run(None, prefix, False, inputs, forced=[forced[b][r]])[0].sequences

    return replay


def _parts(engine: ExitEngine, forced: list[Any] | None, samples: list, prefix: Any) -> dict[str, float]:
    """Return mean milliseconds: encoder side, decoder, signals among it."""
    streams = {stream.name for stream in engine.backbone.encoders}
    total: dict[str, float] = {}
    for sample in samples:
        b, r = sample["place"]
        depths = None if forced is None else [forced[b][r]]
        with torch.inference_mode():
            ms = engine.run(None, prefix, True, sample, forced=depths)[0].timings
        for part, value in ms.items():
            name = "encoder" if part in streams else part if part in ("total", "signals") else "decoder"
            total[name] = total.get(name, 0.0) + value / len(samples)
            if name == "signals":
                total["decoder"] = total.get("decoder", 0.0) + value / len(samples)
    return total


def write(args: Any, entries: dict[str, Entry], data: Any, layers: dict, last: dict[str, int]) -> None:
    """Write the table as Markdown and the figures as JSON."""
    full = entries[FULL].answers
    lines = [_header(args.metric, layers)]
    lines.append("| --- |" + " --- |" * (lines[0].count("|") - 2))
    order = sorted(entries.items(), key=lambda item: -(item[1].timing.ratio if item[1].timing else 9))
    for name, entry in order:
        lines.append(_line(name, entry, full, layers))
    kept = entries[FIRST].answers.quality / full.quality if full.quality else float("nan")
    control = f"Control: everything at its first exit keeps {kept:.1%} of full-depth {args.metric}"
    control += " - depth hardly matters here, and no saving is credited to exits." if kept >= 0.99 else "."
    kind = "K/V modes at equal quality" if args.kv_modes else "methods"
    text = (
        f"# {args.name}: {kind} of the papers\n\n{device()}, {args.threads} thread(s), torch {torch.__version__}; "
        f"{today()}. Layers at full depth: {last}. Quality on {len(full.scores)} test samples of "
        f"{len(set(full.clusters))} sources; 95 % interval of the share kept by drawing sources again. Each method at "
        f"the boldest setting that kept {args.keep:.0%} on the tuning data. Time: batch 1, {args.timed_samples} "
        f"samples, {args.repeats} repeats, all in turn: medians; ratio to our engine at full depth, paired. The parts "
        "(means, signals of the decoder being part of its ms) are of one further pass over the same samples. "
        f"{_split(data)}\n\n"
        + "\n".join(lines)
        + f"\n\n{control}\n\nSettings:\n\n"
        + "\n".join(f"* {name}: {_setting(entry)}" for name, entry in order)
        + "\n"
    )
    stem = f"papers_{args.name}{'_kv' if args.kv_modes else ''}_{today()}"
    target = Path(__file__).parents[1] / "results" / stem
    write_text(target.with_suffix(".md"), text)
    write_text(target.with_suffix(".json"), json.dumps(_figures(entries, full), indent=1) + "\n")
    print(text)


def _split(data: Any) -> str:
    if data.hparams["test"] is not None or data.has_test_shards:
        return "Test data: shards of their own."
    return (
        "Test data: the validation split, which no method was tuned on; training looked at it, but kept its last step."
    )


def _header(metric: str, layers: dict) -> str:
    depths = " | ".join(f"{stream} depth" for stream in layers)
    return (
        f"| method | {metric} | kept (95 %) | same output | {depths} | computed | filled | layers saved | "
        "encoder ms | decoder ms | signals ms | total ms | p95 | ratio |"
    )


def _line(name: str, entry: Entry, full: Answers, layers: dict) -> str:
    found, timing = entry.answers, entry.timing
    low, high = interval(found.scores, full.scores, full.clusters)
    depths = " | ".join(f"{found.depth(s):.2f}" for s in layers)
    parts = entry.parts or {}
    cells = [f"{parts[p]:.2f}" if p in parts else "-" for p in ("encoder", "decoder", "signals")]
    assert timing is not None
    spread = "" if timing.ratio_spread is None else f" ± {timing.ratio_spread / 2:.3f}"
    return (
        f"| {name} | {found.quality:.4f} | {found.quality / max(full.quality, 1e-9):.3f} ({low:.3f}-{high:.3f}) | "
        f"{found.same(full):.3f} | {depths} | {found.computed:.2f} | "
        f"{found.filled:.2f} | {found.layers_saved:.1%} | {' | '.join(cells)} | "
        f"{timing.p50_ms:.2f} | {timing.p95_ms:.2f} | {timing.ratio:.3f}{spread} |"
    )


def _setting(entry: Entry) -> str:
    return in_words(entry.policy) + (f" ({entry.note})" if entry.note else "")


def _figures(entries: dict[str, Entry], full: Answers) -> dict[str, Any]:
    return {
        name: {
            "quality": e.answers.quality,
            "same": e.answers.same(full),
            "p50_ms": e.timing.p50_ms if e.timing else None,
            "ratio": e.timing.ratio if e.timing else None,
            "computed": e.answers.computed,
            "depths": {s: float(d.mean()) for s, d in e.answers.depths.items()},
        }
        for name, e in entries.items()
    }


if __name__ == "__main__":
    main()
