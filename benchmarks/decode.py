"""What a decode costs: transformers' ``generate`` beside our executors, with random weights and forced depths.

    python benchmarks/decode.py --shape issue

The decoder alone, on a memory that is given: all steps, the projection of the memory's K/V and the head included.
Nothing is learned and no signal asked, so this is cost and no quality. Every line (``decode_lines.py``) is first held
against the fp32 model: what it chose must be what that model's own states say at the same depths. All lines of a batch
size are timed in turn, in a new order each round. Writes ``benchmarks/results/decode_<shape>_<date>.md``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from decode_case import Case, Shape
from decode_limits import ideal_rows, limit_rows, machines
from decode_lines import ALIKE, BASELINE, COMPILED, LINES
from decode_measure import Measured, measure
from decode_predicted import predictions
from rich.progress import Progress
from targets import device, note, today

from lightning_mue.files import write_text

RESULTS, SHAPES = Path(__file__).parent / "results", Path(__file__).parent / "shapes.json"
REPEATS = {1: 7, 8: 5, 32: 3}
PACKAGES = ("torch", "transformers", "onnxruntime")
INSTRUCTIONS = ("avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8", "bf16", "i8mm")
COLUMNS = (
    "line",
    "ms",
    f"of {BASELINE}",
    "speed-up",
    "= own full depth",
    "x exits",
    "layers ms",
    "memory ms",
    "head ms",
    "layers of own full depth",
    "mean depth",
    "computed",
    "pairs",
    "K/V MB",
    "memory K/V MB",
    "predicted ms",
    "predicted / measured",
)


@dataclass(frozen=True)
class Promise:
    """A figure of ``targets.json``, one for each batch size.

    Args:
        name: of the figure, without the batch size.
        ours: line.
        theirs: lines; the faster one counts.
        targets: batch size -> value.
        layers: compare the layers alone, as a ratio of times, instead of whole decodes, as a speed-up.
    """

    name: str
    ours: str
    theirs: tuple[str, ...]
    targets: Mapping[int, float]
    layers: bool = False

    @property
    def unit(self) -> str:
        """What the value says."""
        theirs = " or ".join(self.theirs)
        return f"layers' time: {self.ours} of {theirs}" if self.layers else f"times as fast: {self.ours} as {theirs}"

    def value(self, found: Mapping[str, Measured]) -> float | None:
        """Return the median over rounds, or None where a line is not there."""
        if not {self.ours, *self.theirs} <= set(found):
            return None
        theirs = min((found[name] for name in self.theirs), key=lambda line: float(np.median(line.ms)))
        if self.layers:
            return float(np.median(found[self.ours].parts["layers"] / theirs.parts["layers"]))
        return float(np.median(theirs.ms / found[self.ours].ms))

    def is_kept(self, batch: int, value: float) -> bool:
        """Whether this value is as good as promised."""
        return value <= self.targets[batch] if self.layers else value >= self.targets[batch]


INT8 = ("generate int8 sdpa", "generate int8 eager")
LAYERS = {1: 0.55, 8: 0.6, 32: 0.6}
PROMISED = "issue"
PROMISES = (
    Promise("decode_fp32_full_vs_generate", "ORT fp32 full", (BASELINE,), {1: 1.9, 8: 1.8, 32: 1.6}),
    Promise("decode_fp32_exits_vs_generate", "ORT fp32 screened ragged", (BASELINE,), {1: 3.5, 8: 2.3, 32: 2.0}),
    Promise("decode_int8_exits_vs_generate", "ORT int8 ragged", (BASELINE,), {1: 7.0, 8: 6.0, 32: 6.0}),
    Promise("decode_int8_exits_vs_generate_int8", "ORT int8 ragged", INT8, {1: 2.1, 8: 1.8, 32: 1.8}),
    Promise("decode_fp32_exits_layers", "ORT fp32 ragged", ("ORT fp32 full",), LAYERS, layers=True),
    Promise("decode_int8_exits_layers", "ORT int8 ragged", ("ORT int8 full",), LAYERS, layers=True),
)
"""Of the shape ``PROMISED``, on one thread. Where a line is not there yet, the figure is said to be missing."""
PREDICTED = 0.1
"""Predictions are promised to be off by so much at most."""


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.threads == 1 else time.perf_counter
    shape = read_shape(args.shape)
    found: dict[int, dict[str, Measured]] = {}
    notes: dict[int, dict[str, str]] = {}
    predicted: dict[int, dict[str, float]] = {}
    lines = {**LINES, **(COMPILED if args.compiled else {})}
    with Progress() as bars:
        bar = bars.add_task("decodes", total=sum(len(lines) * (1 + repeats) for repeats in args.repeats))
        for batch, repeats in zip(args.batch_sizes, args.repeats, strict=True):
            bars.update(bar, description=f"decodes at batch {batch}")
            case = Case(shape, batch, clock, args.seed)  # its models are forgotten before the next one's are made
            found[batch] = measure(case, lines, repeats, lambda: bars.advance(bar))
            found[batch] |= ideal_rows(case, found[batch]) | limit_rows(case, machines(case))
            notes[batch], predicted[batch] = case.notes, predictions(case, lines)
    text = report(args, shape, found, notes, predicted)
    threads = "" if args.threads == 1 else f"_{args.threads}_threads"
    sizes = "" if args.batch_sizes == list(REPEATS) else f"_batch_{'_'.join(map(str, args.batch_sizes))}"
    target = Path(args.out) / f"decode_{args.shape}{sizes}{threads}_{today()}.md"
    write_text(target, text)
    if promised(args) and target.parent == RESULTS:
        for promise, batch, value in values(found):
            if value is not None:
                better = "lower" if promise.layers else "higher"
                name = f"{promise.name}_b{batch}"
                note(name, value, promise.targets[batch], better, promise.unit, command(args), where(args.threads))
        for batch, of_batch in predicted.items():
            unit = "of a line's time: how far predictions are off at most"
            off = farthest(found[batch], of_batch)
            note(f"cost_model_off_b{batch}", off, PREDICTED, "lower", unit, command(args), where(args.threads))
    print(text)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default=PROMISED, choices=json.loads(SHAPES.read_text()))
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=list(REPEATS))
    parser.add_argument("--repeats", type=int, nargs="+", help="one number, or one for each batch size")
    parser.add_argument("--threads", type=int, default=1, help="1: CPU time; more: wall clock")
    parser.add_argument("--compiled", action="store_true", help="transformers' compiled forward too; takes minutes")
    parser.add_argument("--seed", type=int, default=2, help="at 2, ragged depths compute about the expected pairs")
    parser.add_argument("--out", default=str(RESULTS), help="folder; only in the usual one are targets noted too")
    args = parser.parse_args(argv)
    if args.repeats is None:
        args.repeats = [REPEATS.get(batch, min(REPEATS.values())) for batch in args.batch_sizes]
    elif len(args.repeats) == 1:
        args.repeats *= len(args.batch_sizes)
    if len(args.repeats) != len(args.batch_sizes) or min(args.repeats) < 1:
        parser.error(f"--repeats must be one number above 0, or {len(args.batch_sizes)}, got {args.repeats}")
    return args


def read_shape(name: str) -> Shape:
    """Return a shape of ``shapes.json``."""
    return Shape(**json.loads(SHAPES.read_text())[name])


def promised(args: argparse.Namespace) -> bool:
    """Whether the promises are of this run."""
    return args.shape == PROMISED and args.threads == 1


def values(found: Mapping[int, Mapping[str, Measured]]) -> list[tuple[Promise, int, float | None]]:
    """Return each promise at each batch size that was measured, with its value."""
    return [(p, batch, p.value(of_batch)) for p in PROMISES for batch, of_batch in found.items() if batch in p.targets]


def farthest(found: Mapping[str, Measured], predicted: Mapping[str, float]) -> float:
    """Return by which share of it the cost model is off a line's time, at most."""
    return max(abs(ms / float(np.median(found[name].ms)) - 1) for name, ms in predicted.items())


def report(
    args: argparse.Namespace,
    shape: Shape,
    found: Mapping[int, Mapping[str, Measured]],
    notes: Mapping[int, Mapping[str, str]],
    predicted: Mapping[int, Mapping[str, float]],
) -> str:
    """Return the page."""
    clock = "CPU time of the process" if args.threads == 1 else "wall clock"
    half = shape.layers // 2
    text = (
        f"# What a decode costs: {args.shape}\n\n{where(args.threads)}; {today()}. Like {shape.like}: {shape.layers} "
        f"decoder layers, width {shape.width}, {shape.heads} heads, FFN {shape.ffn}, vocabulary {shape.vocabulary:,}, "
        f"{shape.memory} memory tokens, {shape.steps} steps.\n\n"
        "Random weights, and depths that are given: cost alone, no quality, no signal. One decode: all steps, with the "
        "projection of the memory's K/V and the head; nothing ends an answer, so no side has a logits processor. Every "
        f"line chose what the fp32 model says at the same depths (in lower precision: {ALIKE:.0%} of the tokens at "
        f"least). Time: {clock}, all lines in turn, in a new order each round; medians with quartiles, ratios paired "
        f"by round.\n\nstatic: every token leaves at layer {half}. ragged: every token of every row leaves at a layer "
        f"of its own from 1 to {shape.layers}, {half} in the mean. Missing positions are caught up just in time, "
        "exactly; 'computed' is the mean depth with them.\n\n"
        f"A speed-up is made of two things: what our own full depth of the same precision gains on {BASELINE} (kernels "
        "and precision, no exits), times what exits gain on that. Exits save nothing of the head, and nothing of the "
        "memory's projection once every row has been in the last layer.\n\n"
        "ideal: own full depth with the layers' time cut to the ragged depths' share of pairs, nothing caught up. "
        "limit: weights and the memory's K/V read, and multiplied with, as fast as this machine was seen to do either, "
        "the head in 8 bits; nothing else. Neither is decoded. K/V: held at the end of a decode, of the answer itself "
        "and of the memory. predicted: by the cost model, from pieces measured one by one. "
        "assisted: the assistant is the model itself, cut after half of its layers, all weights "
        "shared; with random weights its drafts are hardly ever right.\n"
    )
    for (batch, of_batch), repeats in zip(found.items(), args.repeats, strict=True):
        rows = "\n".join(_row(name, of_batch, predicted[batch]) for name in of_batch)
        header = f"| {' | '.join(COLUMNS)} |\n| --- |{' ---: |' * (len(COLUMNS) - 1)}"
        text += f"\n## Batch {batch}, {repeats} repeats\n\n{header}\n{rows}\n"
        text += "".join(f"\n{name}: {about}.\n" for name, about in notes[batch].items())
    return text + (f"\n## Promises\n\n{_promises(found)}" if promised(args) else "")


def _row(name: str, found: Mapping[str, Measured], predicted: Mapping[str, float]) -> str:
    this, baseline = found[name], found[BASELINE]
    ratio = this.ms / baseline.ms
    cells = [name, spread(this.ms, 1), spread(ratio, 3), f"{np.median(1 / ratio):.2f}"]
    last = [f"{held / 1e6:.2f}" if held else "-" for held in this.answer.cache]
    ms = predicted.get(name)
    last += ["-", "-"] if ms is None else [f"{ms:.1f}", f"{ms / np.median(this.ms):.2f}"]
    full, depths = found.get(this.full or ""), this.answer.depths
    if full is None or depths is None:
        return f"| {' | '.join([*cells, *['-'] * (len(COLUMNS) - len(cells) - len(last)), *last])} |"
    cells += [f"{np.median(baseline.ms / full.ms):.2f}", f"{np.median(full.ms / this.ms):.2f}"]
    cells += [f"{np.median(this.parts[part]):.1f}" for part in ("layers", "memory", "head")]
    tokens = sum(map(len, depths))
    cells += [spread(this.parts["layers"] / full.parts["layers"], 3), f"{sum(map(sum, depths)) / tokens:.2f}"]
    return f"| {' | '.join([*cells, f'{this.answer.pairs / tokens:.2f}', f'{this.answer.pairs:,}', *last])} |"


def spread(values: np.ndarray, digits: int) -> str:
    """Return the median with the quartiles."""
    low, middle, high = (f"{value:.{digits}f}" for value in np.percentile(values, [25, 50, 75]))
    return f"{middle} ({low}-{high})"


def _promises(found: Mapping[int, Mapping[str, Measured]]) -> str:
    lines = ["| figure | what | measured | promised | |", "| --- | --- | ---: | ---: | --- |"]
    for promise, batch, value in values(found):
        measured = "-" if value is None else f"{value:.2f}"
        verdict = "no such line" if value is None else "kept" if promise.is_kept(batch, value) else "not kept"
        target = f"{'<=' if promise.layers else '>='} {promise.targets[batch]}"
        lines.append(f"| {promise.name}_b{batch} | {promise.unit} | {measured} | {target} | {verdict} |")
    return "\n".join(lines) + "\n"


def where(threads: int) -> str:
    """Return the device with its instructions for lower precision, the threads and the versions."""
    info = Path("/proc/cpuinfo")
    words = set(info.read_text().split()) if info.exists() else set()
    instructions = ", ".join(name for name in INSTRUCTIONS if name in words) or "none for bf16 or int8 known"
    versions = []
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions.append(f"{package} {version(package)}")
    return f"{device()} ({instructions}), {threads} thread(s), {', '.join(versions)}"


def command(args: argparse.Namespace) -> str:
    """Return the command line that measures this again."""
    sizes, repeats = (" ".join(map(str, numbers)) for numbers in (args.batch_sizes, args.repeats))
    compiled = " --compiled" if args.compiled else ""
    return (
        f"python benchmarks/decode.py --shape {args.shape} --batch-sizes {sizes} --repeats {repeats} --seed {args.seed}"
        + compiled
    )


if __name__ == "__main__":
    main()
