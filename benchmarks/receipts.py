"""Reading receipts: full depth, static depths and calibrated exits on a recipe's test data, in one interleaved run.

    python benchmarks/receipts.py --ckpt_path runs/sroie_lines_trocr/last.ckpt --name sroie_lines_trocr

All lines run in the policy's runtime and precision. Reads ``policy.json`` beside the checkpoint if none is given;
writes ``benchmarks/results/receipts_<name>_<date>.md``.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from papers.bounds import interval
from rich.progress import Progress
from runs import load_run
from targets import device, note, today
from torchmetrics.functional.text import char_error_rate

from lightning_mue.answers import Answers
from lightning_mue.backbones import num_layers, view
from lightning_mue.benchmark.entry import mean_parts
from lightning_mue.benchmark.exam import Exam
from lightning_mue.benchmark.lines import Times, engine_line, measure
from lightning_mue.benchmark.ours import OurLines
from lightning_mue.benchmark.policies import CALIBRATED, FIRST, FULL, first_exits, static_depths
from lightning_mue.files import write_text
from lightning_mue.metrics import scorer
from lightning_mue.policy import ExitPolicy
from lightning_mue.policy_file import find_policy

METRICS = ("exact_text", "anls")


@dataclass(frozen=True)
class Reading:
    """What was measured of a line.

    Args:
        scores: metric -> of each sample.
        letters_wrong: edits / letters over all the data, against the first references.
        answers: to all test data.
        times: of the timed samples.
        encoder_ms: mean of the streams before the decoder.
        decoder_ms: mean of all else.
    """

    scores: Mapping[str, np.ndarray]
    letters_wrong: float
    answers: Answers
    times: Times
    encoder_ms: float
    decoder_ms: float


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    changed = {} if args.data is None else {"train": args.data}
    module, data = load_run(args.ckpt_path, **changed)
    data.setup("test")
    policy = find_policy(args.policy, args.ckpt_path)
    exam = Exam.of(module.model, data, args.metric)
    found, runtime = read(exam, policy, args)
    text = page(args, found, exam, policy, runtime)
    write_text(Path(__file__).parent / "results" / f"receipts_{args.name}_{today()}.md", text)
    print(text)
    _note(args, found)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt_path", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--data", help="the shards, if they lie elsewhere than in training")
    parser.add_argument("--policy", help="policy.json; the one beside the checkpoint if not given")
    parser.add_argument("--metric", default="exact_text", help="whose share kept is told with an interval")
    parser.add_argument("--runtime", help="torch or onnxruntime; the policy's if not given")
    parser.add_argument("--timed-samples", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def read(exam: Exam, policy: ExitPolicy, args: argparse.Namespace) -> tuple[dict[str, Reading], str]:
    """Return the lines, and what ran them."""
    ours = OurLines(exam, policy, args.runtime)
    policies = {FULL: ExitPolicy.full_depth(), **static_depths(exam.model)}
    policies |= {FIRST: first_exits(exam.model), CALIBRATED: policy}
    lines = {name: engine_line(exam, ours.place(some), FULL) for name, some in policies.items()}
    samples = exam.picked(args.timed_samples)
    with Progress() as bars:
        bar = bars.add_task("quality", total=len(exam) * len(lines))
        answers = {name: line.decode(lambda size: bars.advance(bar, size)) for name, line in lines.items()}
        bar = bars.add_task("time", total=len(samples) * args.repeats)
        variants = {name: line.answer for name, line in lines.items()}
        times = measure(variants, samples, args.repeats, FULL, lambda: bars.advance(bar))
    references = [refs for batch in exam.batches for refs in batch["references"]]
    streams, found = set(num_layers(view(exam.model))) - {"decoder"}, {}
    for name, line in lines.items():
        texts, parts = answers[name].texts, mean_parts(line, samples)
        scores = {m: np.array([scorer(m)(t, r) for t, r in zip(texts, references, strict=True)]) for m in METRICS}
        before = sum(parts[stream] for stream in streams)
        wrong = float(char_error_rate(texts, [refs[0] for refs in references]))
        found[name] = Reading(scores, wrong, answers[name], times[name], before, parts["total"] - before)
    return found, f"{ours.runtime} {ours.precision or 'float32'}"


def page(args: argparse.Namespace, found: Mapping[str, Reading], exam: Exam, policy: ExitPolicy, runtime: str) -> str:
    """Return the page."""
    full = found[FULL]
    streams = list(found[CALIBRATED].answers.mean_depths)
    header = ["line", *METRICS, "letters wrong", f"{args.metric} kept (95 %)", "same output"]
    header += [*(f"{stream} depth" for stream in streams), "encoder ms", "decoder ms", "total ms p50", "p95", "mean"]
    header += ["ratio", "of means"]
    rows = [header, ["---"] * len(header), *(_cells(n, one, full, args.metric, streams) for n, one in found.items())]
    sources = len(set(full.answers.clusters))
    promise = policy.certificate.in_words() if policy.certificate else "Not calibrated."
    kept = _kept(found[FIRST], full, args.metric)
    return (
        f"# {args.name}: reading receipts\n\n{device()}, {args.threads} thread(s), torch {torch.__version__}, "
        f"{runtime}; {today()}. Layers: {num_layers(view(exam.model))}. Quality on {len(exam)} test samples of "
        f"{sources} receipts that neither trained nor calibrated; 95 % interval of the share kept by drawing receipts "
        f"again. Time: batch 1, {args.timed_samples} samples, {args.repeats} repeats, all lines in turn; ratio to full "
        "depth in the same runtime and precision, paired by sample, ± half the interquartile range of the repeats, and "
        "that of the mean times. Encoder (vision, and what reads words) and decoder: means of one further pass over "
        "the same samples.\n\n"
        + "\n".join(f"| {' | '.join(row)} |" for row in rows)
        + f"\n\nPolicy: {policy.depths_in_words()}. {promise}\n\nControl: everything at its first exit keeps "
        f"{kept:.1%} of full-depth {args.metric}.\n"
    )


def _kept(one: Reading, full: Reading, metric: str) -> float:
    return float(one.scores[metric].mean() / max(full.scores[metric].mean(), 1e-12))


def _cells(name: str, one: Reading, full: Reading, metric: str, streams: Sequence[str]) -> list[str]:
    low, high = interval(one.scores[metric], full.scores[metric], full.answers.clusters)
    ratio, spread = one.times.over(full.times)
    depths, timing = one.answers.mean_depths, one.times.timing
    return [
        name,
        *(f"{one.scores[m].mean():.4f}" for m in METRICS),
        f"{one.letters_wrong:.4f}",
        f"{_kept(one, full, metric):.3f} ({low:.3f}-{high:.3f})",
        f"{one.answers.same(full.answers):.3f}",
        *(f"{depths[stream]:.2f}" for stream in streams),
        f"{one.encoder_ms:.2f}",
        f"{one.decoder_ms:.2f}",
        f"{timing.p50_ms:.2f}",
        f"{timing.p95_ms:.2f}",
        f"{one.times.ms.mean():.2f}",
        f"{ratio:.3f} ± {(spread or 0) / 2:.3f}",
        f"{_of_means(one, full):.3f}",
    ]


def _of_means(one: Reading, full: Reading) -> float:
    """Return the share of all the samples' time together, in which long lines weigh more than in the paired ratio."""
    return float(one.times.ms.mean() / full.times.ms.mean())


def _note(args: argparse.Namespace, found: Mapping[str, Reading]) -> None:
    full, ours = found[FULL], found[CALIBRATED]
    given = [f"--metric {args.metric}", *([f"--runtime {args.runtime}"] if args.runtime else [])]
    command = f"python benchmarks/receipts.py --ckpt_path CKPT --name {args.name} {' '.join(given)}"
    where = f"{device()}, {args.threads} thread(s)"
    note(f"receipts_{args.name}_total", _of_means(ours, full), 0.6, "lower", "of our full depth's mean", command, where)
    kept = _kept(ours, full, args.metric)
    note(f"receipts_{args.name}_kept_{args.metric}", kept, 0.99, "higher", "of full depth", command, where)


if __name__ == "__main__":
    main()
