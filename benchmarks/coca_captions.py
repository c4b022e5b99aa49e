"""Captions of a trained CoCa: open_clip's loop without a cache, our engine at full depth, calibrated exits.

    python benchmarks/coca_captions.py --ckpt_path runs/coca_scenes/last.ckpt --data SHARDS --name coca

The policy is the one beside the checkpoint; all lines of our engine are in its runtime (or the one that is asked for)
and precision. Quality on all test data; time end to end, picture to tokens, all lines in turn on the same samples.
Writes ``benchmarks/results/<name>_captions_<date>.md``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from coca_uncached import uncached_captions
from decode import spread, where
from rich.progress import Progress
from runs import load_run
from targets import note, today
from torch import Tensor

from lightning_mue.answers import Answers
from lightning_mue.backbones import view
from lightning_mue.benchmark.exam import Exam
from lightning_mue.benchmark.lines import Line, Times, engine_line, measure, plain_line
from lightning_mue.benchmark.ours import OurLines
from lightning_mue.benchmark.policies import CALIBRATED, FIRST, first_exits, static_depths
from lightning_mue.files import write_text
from lightning_mue.policy import ExitPolicy
from lightning_mue.policy_file import find_policy

RESULTS = Path(__file__).parent / "results"
UNCACHED = "open_clip's loop, no cache, fp32"
TARGETS = {"vs_uncached": 5.0, "share_of_ceiling": 0.7, "kept": 0.98}


@dataclass(frozen=True)
class Captions:
    """What was measured.

    Args:
        full: name of our full depth.
        answers: line -> captions of all test data.
        times: batch size -> line -> times.
    """

    full: str
    answers: Mapping[str, Answers]
    times: Mapping[int, Mapping[str, Times]]

    def faster(self, size: int, name: str, other: str) -> np.ndarray:
        """Return how many times as fast as another line one is, in each round."""
        return total_ms(self.times[size][other]) / total_ms(self.times[size][name])

    def share(self, size: int) -> np.ndarray:
        """Return what calibrated exits save of what leaving everything at its first exit would, in each round."""
        full, exits, first = (total_ms(self.times[size][name]) for name in (self.full, CALIBRATED, FIRST))
        return (full - exits) / (full - first)

    @property
    def kept(self) -> float:
        """The share of the plain model's quality that calibrated exits keep."""
        return self.answers[CALIBRATED].quality / self.answers[UNCACHED].quality


def total_ms(times: Times) -> np.ndarray:
    """Return the time of all samples, ``[repeats]``."""
    return times.ms.sum(1)


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    torch.set_num_threads(1)
    module, data = load_run(args.ckpt_path, **({} if args.data is None else {"train": args.data}))
    policy = find_policy(args.policy, args.ckpt_path)
    data.setup("test")
    exam = Exam.of(module.model, data, args.metric)
    found = captions(exam, policy, args.runtime, args.batch_sizes, args.timed_samples, args.repeats)
    target = Path(args.out) / f"{args.name}_captions_{today()}.md"
    write_text(target, report(args, exam, policy, found))
    if target.parent == RESULTS:
        for name, value, wanted, unit in figures(found):
            note(f"{args.name}_{name}", value, wanted, "higher", unit, command(args), where(1))
    print(target.read_text())


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt_path", required=True)
    parser.add_argument("--policy", help="policy.json beside the checkpoint if not given")
    parser.add_argument("--data", help="shards; those it was trained on if not given")
    parser.add_argument("--name", default="coca", help="of the page and of the figures")
    parser.add_argument("--metric", default="exact_match")
    parser.add_argument("--runtime", help="torch, onnxruntime or auto; the policy's if not given")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--timed-samples", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", default=str(RESULTS), help="folder; only in the usual one are targets noted too")
    return parser.parse_args(argv)


def command(args: argparse.Namespace) -> str:
    """Return the command line that measures this again."""
    sizes, runtime = " ".join(map(str, args.batch_sizes)), f" --runtime {args.runtime}" if args.runtime else ""
    return (
        f"python benchmarks/coca_captions.py --ckpt_path CKPT --data SHARDS --name {args.name} --metric {args.metric} "
        f"--batch-sizes {sizes} --timed-samples {args.timed_samples} --repeats {args.repeats}{runtime}"
    )


def captions(
    exam: Exam, policy: ExitPolicy, runtime: str | None, sizes: Sequence[int], samples: int, repeats: int
) -> Captions:
    """Caption all test data in every way, and time all ways in turn.

    Args:
        exam: what is captioned.
        policy: the calibrated one.
        runtime: of our engine, as of `ExitEngine`.
        sizes: of the batches that are timed.
        samples: timed, in all batches of a size together.
        repeats: of the timing.

    Raises:
        ValueError: no batch of the test data has so many rows.
    """
    picked = {size: exam.picked(samples, size) for size in sizes}
    ours = OurLines(exam, policy, runtime)
    lines: dict[str, Line] = {UNCACHED: uncached_line(exam)}
    early = {**static_depths(exam.model), FIRST: first_exits(exam.model), CALIBRATED: policy}
    for name, one in {ours.full: ExitPolicy.full_depth(), **early}.items():
        lines[name] = engine_line(exam, ours.place(one), ours.full)
    with Progress() as bars:
        bar = bars.add_task("quality", total=len(exam) * len(lines))
        answers = {name: line.decode(lambda size: bars.advance(bar, size)) for name, line in lines.items()}
        bar = bars.add_task("time", total=repeats * sum(map(len, picked.values())))
        ways = {name: line.answer for name, line in lines.items()}
        times = {
            size: measure(ways, batches, repeats, ours.full, lambda: bars.advance(bar), time.process_time)
            for size, batches in picked.items()
        }
    return Captions(ours.full, answers, times)


def uncached_line(exam: Exam) -> Line:
    """Return the line of the model's own loop."""
    backbone: Any = view(exam.model)
    settings = backbone.decode_settings(exam.max_new_tokens)

    def run(batch: Mapping[str, Any]) -> Tensor:
        how = (settings.start_id, settings.end_ids, settings.max_new_tokens)
        return uncached_captions(backbone.coca, batch["pixel_values"], *how)

    return plain_line(exam, run)


def figures(found: Captions) -> list[tuple[str, float, float, str]]:
    """Return the promised figures: name, value, target, unit."""
    result = [("kept", found.kept, TARGETS["kept"], f"of the quality of {UNCACHED}")]
    for size in found.times:
        faster = float(np.median(found.faster(size, CALIBRATED, UNCACHED)))
        result.append((f"vs_uncached_b{size}", faster, TARGETS["vs_uncached"], f"times as fast as {UNCACHED}"))
        share = float(np.median(found.share(size)))
        result.append((f"share_of_ceiling_b{size}", share, TARGETS["share_of_ceiling"], f"of what {FIRST} saves"))
    return result


def report(args: argparse.Namespace, exam: Exam, policy: ExitPolicy, found: Captions) -> str:
    """Return the page."""
    promise = policy.certificate.in_words() if policy.certificate else "No certificate: this policy was not calibrated."
    quality = args.metric.replace("_", " ")
    text = (
        f"# Captions of a trained CoCa: {args.name}\n\n{where(1)}; {today()}. Quality ({quality}) on all {len(exam)} "
        f"test samples; time on {args.timed_samples} of them, {args.repeats} rounds: CPU time of the process, picture "
        "to tokens, all lines in turn on the same samples; milliseconds of a batch, ratios of a round's totals, "
        f"medians over rounds with quartiles.\n\nPolicy: {policy.depths_in_words()}. {promise}\n\n"
        f"{UNCACHED}: the pictures once, then the whole text anew for every token, open_clip's own modules. "
        f"{FIRST}: no signal is asked; its captions may be of other lengths (tokens). "
        "Share: what calibrated exits save of full depth's time, as a share of what that ceiling saves.\n"
    )
    for size, times in found.times.items():
        header = ("line", quality, "kept", "ms", "x no cache", "x full depth", "depths", "tokens")
        rows = "\n".join(f"| {' | '.join(_cells(found, size, name))} |" for name in times)
        text += f"\n## Batch {size}\n\n| {' | '.join(header)} |\n| --- |{' ---: |' * (len(header) - 1)}\n{rows}\n\n"
        text += f"Share of the ceiling's saving: {spread(found.share(size), 3)}.\n"
    text += "\n## Promises\n\n| figure | measured | promised | |\n| --- | ---: | ---: | --- |\n"
    for name, value, target, unit in figures(found):
        verdict = "kept" if value >= target else "not kept"
        text += f"| {args.name}_{name}: {unit} | {value:.3f} | >= {target} | {verdict} |\n"
    return text


def _cells(found: Captions, size: int, name: str) -> list[str]:
    times, answers = found.times[size], found.answers[name]
    tokens = [len(row) for rows in answers.by_row for row in rows]
    return [
        name,
        f"{answers.quality:.3f}",
        f"{answers.quality / found.answers[UNCACHED].quality:.1%}",
        spread(times[name].ms.mean(1), 2),
        spread(found.faster(size, name, UNCACHED), 2),
        spread(found.faster(size, name, found.full), 2),
        ", ".join(f"{stream} {depth:.2f}" for stream, depth in answers.mean_depths.items()) or "-",
        f"{np.mean(tokens):.1f}" if tokens else "-",
    ]


if __name__ == "__main__":
    main()
