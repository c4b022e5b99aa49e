"""One table per task: every method of the papers over the same model, engine and data, in one interleaved run.

    python -m papers.compare --ckpt_path runs/sroie_lines/last.ckpt --name sroie_lines --metric exact_text

(from the folder ``benchmarks``). Each method's setting is the boldest that keeps ``--keep`` of full-depth quality on
the recipe's calibration data, decoded for real; quality is then measured on its test data, time on some of that, at
batch 1. ``--policy policy.json`` measures that certified policy in place of the calibrator's proposals.
Writes ``benchmarks/results/papers_<name>_<date>.md`` and, for the report, the same as JSON.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from papers.bounds import interval, oracle_depths
from papers.entry import Entry, head_to_head, time_all
from papers.task import Task, arguments, command
from rich.progress import track
from targets import device, note, today

from lightning_mue.answers import Answers, plain_answers
from lightning_mue.backbones import view
from lightning_mue.calibration import propose, rehearse
from lightning_mue.calibration.rows import StreamRows
from lightning_mue.calibration.simulate import stream_cost
from lightning_mue.exits import attached
from lightning_mue.files import write_text
from lightning_mue.inference import ExitEngine
from lightning_mue.inference.compare import transformers_variant
from lightning_mue.methods import STATIC, boldest, families, in_words, last_good
from lightning_mue.policy import ExitPolicy, ExitRule
from lightning_mue.promise import Promise
from lightning_mue.side_by_side import FIRST, FULL, PLAIN, first_exits

CERTIFIED, PROPOSED = "calibrated exits", "proposed exits (not certified)"
STATICS = "best static depths of all streams"
ORACLE = "decoder oracle: first exit that agrees"
IDEAL = "ideal cost: our exits' depths, asking nothing and copying K/V (other tokens)"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--policy", help="a certified policy, measured as the calibrated exits")
    args = parser.parse_args()
    task = Task.load(args)
    entries = _entries(task, args.policy)
    plain = transformers_variant(task.model, None, task.prefix)
    timing = time_all(task, entries, FULL, args, {PLAIN: plain})[PLAIN]
    scores, texts = plain_answers(plain, task.test, task.data, task.score)
    full = replace(entries[FULL].answers, scores=scores, texts=texts)
    entries[PLAIN] = Entry(ExitPolicy.full_depth(), full, timing=timing)
    ours = entries[_ours(entries)]
    ours.head_to_head = head_to_head(task, ours.policy, entries[STATICS].policy, args)
    write(args, entries, task)
    _note(args, entries, task)


def _entries(task: Task, path: str | None) -> dict[str, Entry]:
    """Tune every method and decode the test data with it."""
    decoder = task.layers["decoder"]
    found = {FULL: ExitPolicy.full_depth(), FIRST: first_exits(task.model)}
    found |= {f"{STATIC} {k}": ExitPolicy({"decoder": ExitRule.static(k)}) for k in decoder}
    found[STATICS] = _statics(task)
    steps, gates = view(task.model).decode_settings(None).max_new_tokens, attached(task.model).config.gate
    methods = families(task.layers, task.last, steps, gates)
    for name, family in track(methods.items(), "tuning the methods"):
        if name != STATIC:
            found[name] = boldest(family, task.tuning_quality, task.least)
    ours = PROPOSED if path is None else CERTIFIED
    found[ours] = _proposed(task) if path is None else certified(task, path)
    entries = {name: Entry(policy, task.decode(policy)) for name, policy in track(found.items(), "test data")}
    for name, policy in found.items():
        if name in methods and not policy.rules:
            entries[name].note = f"no setting kept {task.keep:.0%} on the tuning data"
    if certificate := found[ours].certificate:
        (evidence,) = certificate.evidence
        kept = f"{evidence.kept:.1%} kept" if certificate.kind == "estimate" else evidence.subject
        entries[ours].note = f"{certificate.kind}: {kept}"
    return entries | _lower_bounds(task, found[ours], entries[ours].answers)


def _ours(entries: dict[str, Entry]) -> str:
    return CERTIFIED if CERTIFIED in entries else PROPOSED


def certified(task: Task, path: str) -> ExitPolicy:
    """Return the policy of a file, if it is for these weights and this promise."""
    policy = ExitPolicy.load(path)
    ExitEngine(task.model, policy)  # refuses other weights
    certificate = policy.certificate
    if certificate is None or certificate.promise != Promise(task.metric, keep=task.keep):
        raise SystemExit(f"{path} promises {certificate}; asked was {task.keep} of {task.metric}.")
    return policy


def _statics(task: Task) -> ExitPolicy:
    """Return the cheapest combination of static depths, of all streams, that keeps enough on the tuning data."""
    return next(p for p in static_combinations(task) if not p.rules or task.tuning_quality(p) >= task.least)


def static_combinations(task: Task) -> list[ExitPolicy]:
    """Return all combinations of static depths, full depth among them, from cheap to dear by the latency table."""
    options = []
    for stream, layers in task.layers.items():
        rules = [None, *(ExitRule.static(k) for k in layers)]
        traced = StreamRows.of(task.trace, stream)
        costs = [stream_cost(traced, rule, task.latency)[0].mean() for rule in rules]
        options.append([(cost, stream, rule) for cost, rule in zip(costs, rules, strict=True)])
    choices = sorted(itertools.product(*options), key=lambda choice: sum(cost for cost, _, _ in choice))
    return [ExitPolicy({stream: rule for _, stream, rule in choice if rule is not None}) for choice in choices]


def _proposed(task: Task) -> ExitPolicy:
    """Return the boldest link of the chain, as the calibrator proposes and rehearses it, that keeps enough."""
    metric = "consistency" if task.tune_by == "outputs" or task.metric == "cider" else task.metric
    proposal = rehearse(
        propose(task.trace, task.latency, [Promise(metric, keep=task.keep)]), task.trace, task.rehearsed
    )
    links = [c.policy for c in proposal.chain]
    chosen = last_good(len(links), lambda k: task.tuning_quality(links[k - 1]) >= task.least)
    return links[chosen - 1] if chosen else ExitPolicy.full_depth()


def _lower_bounds(task: Task, policy: ExitPolicy, ours: Answers) -> dict[str, Entry]:
    """Replay the oracle's depths, and the calibrated exits' without asking a signal and without catching up.

    The second shows what the same depths would cost if upkeep were a copy; with other K/V its tokens may differ.
    """
    full = ExitPolicy.full_depth()
    oracle = oracle_depths(task.model, task.test, task.data, task.layers["decoder"])
    free = ExitPolicy({s: r for s, r in policy.rules.items() if s != "decoder"}, kv_fill="copy")
    return {
        ORACLE: Entry(full, task.decode(full, oracle), oracle),
        IDEAL: Entry(free, task.decode(free, ours.by_row), ours.by_row),
    }


def write(args: Any, entries: dict[str, Entry], task: Task) -> None:
    """Write the table as Markdown and the figures as JSON."""
    full = entries[FULL].answers
    lines = [_header(task)]
    lines.append("| --- |" + " --- |" * (lines[0].count("|") - 2))
    order = sorted(entries.items(), key=lambda item: -(item[1].timing.ratio if item[1].timing else 9))
    lines += [_line(name, entry, full, task.layers) for name, entry in order]
    text = (
        f"# {task.name}: methods of the papers\n\n{device()}, {args.threads} thread(s), torch {torch.__version__}; "
        f"{today()}. Layers at full depth: {task.last}. Quality on {len(full.scores)} test samples of "
        f"{len(set(full.clusters))} sources; 95 % interval of the share kept by drawing sources again. Every method "
        f"and the static depths at the boldest setting that kept {task.keep:.0%} of {task.tune_by} on "
        f"{sum(len(b['sample_id']) for b in task.tuning)} tuning samples; calibrated exits as certified on all of the "
        f"calibration data. Time: batch 1, {args.timed_samples} samples, {args.repeats} repeats, all in turn: medians; "
        "ratio to our engine at full depth, paired, ± half the interquartile range of the repeats. The parts (means, "
        "signals of the decoder being part of its ms) are of one further pass over the same samples. "
        f"{_remarks(task)}\n\n"
        + "\n".join(lines)
        + f"\n\n{_control(entries, task.metric)}\n\nSettings:\n\n"
        + "\n".join(f"* {name}: {_setting(entry)}" for name, entry in order)
        + "\n"
    )
    target = Path(__file__).parents[1] / "results" / f"papers_{task.name}_{today()}"
    write_text(target.with_suffix(".md"), text)
    write_text(target.with_suffix(".json"), json.dumps(_figures(entries, full), indent=1) + "\n")
    print(text)


def _remarks(task: Task) -> str:
    joint = "encoder" in task.layers
    split = task.data.hparams["test"] is not None or task.data.has_test_shards
    return " ".join(
        (
            "MuE's rule acts on the joint encoder here: picture and text are not decomposed." if joint else "",
            "Test data: shards of their own."
            if split
            else "Test data: the validation split, which no method was tuned on; training looked at it, but kept its "
            "last step.",
        )
    ).strip()


def _control(entries: dict[str, Entry], metric: str) -> str:
    full, first, best = (entries[name].answers.quality for name in (FULL, FIRST, STATICS))
    kept = first / full if full else float("nan")
    text = f"Control: everything at its first exit keeps {kept:.1%} of full-depth {metric}"
    text += " - depth hardly matters here, and no saving is credited to exits." if kept >= 0.99 else "."
    ours, static = entries[_ours(entries)], entries[STATICS]
    paired = ours.head_to_head
    assert paired is not None
    low, high = interval(ours.answers.scores, static.answers.scores, static.answers.clusters)
    return (
        f"{text} {_ours(entries).capitalize()} against the best static depths, alone and paired, in three times the "
        f"repeats: {paired.ratio:.3f} ± {(paired.ratio_spread or 0) / 2:.3f} of the time, "
        f"{ours.answers.quality / max(best, 1e-9):.3f} ({low:.3f}-{high:.3f}) of the quality."
    )


def _note(args: Any, entries: dict[str, Entry], task: Task) -> None:
    """Write what was promised of the exits into ``targets.json``."""
    full, ours = entries[FULL], entries[_ours(entries)]
    assert ours.timing is not None
    assert ours.head_to_head is not None
    where = f"{device()}, {args.threads} thread(s), torch {torch.__version__}"
    for what, value, target, better, unit in (
        (
            "kept",
            ours.answers.quality / full.answers.quality,
            task.keep,
            "higher",
            f"share of full-depth {task.metric}",
        ),
        ("time_ratio", ours.timing.ratio, 1.0, "lower", "of our engine at full depth"),
        ("over_static", ours.head_to_head.ratio, 1.0, "lower", "of the best static depths' time"),
    ):
        unit = f"{unit}, {_ours(entries)}"
        note(f"{task.name}_{what}", value, target, better, unit, command(args, "papers.compare"), where)


def _header(task: Task) -> str:
    depths = " | ".join(f"{stream} depth" for stream in task.layers)
    return (
        f"| method | {task.metric} | kept (95 %) | same output | {depths} | computed | filled | layers saved | "
        "encoder ms | decoder ms | signals ms | total ms | p95 | ratio |"
    )


def _line(name: str, entry: Entry, full: Answers, layers: dict) -> str:
    found, timing = entry.answers, entry.timing
    low, high = interval(found.scores, full.scores, full.clusters)
    depths = " | ".join("-" if name == PLAIN else f"{found.mean_depths[s]:.2f}" for s in layers)
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
    replayed = ", decoder depths replayed" if entry.forced else ""
    return in_words(entry.policy) + replayed + (f" ({entry.note})" if entry.note else "")


def _figures(entries: dict[str, Entry], full: Answers) -> dict[str, Any]:
    return {
        name: {
            "quality": e.answers.quality,
            "same": e.answers.same(full),
            "p50_ms": e.timing.p50_ms if e.timing else None,
            "ratio": e.timing.ratio if e.timing else None,
            "computed": e.answers.computed,
            "depths": e.answers.mean_depths,
        }
        for name, e in entries.items()
    }


if __name__ == "__main__":
    main()
