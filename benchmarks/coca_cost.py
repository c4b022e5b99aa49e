"""What captions of a CoCa of real size cost: open_clip's loop without a cache beside our executors, depths given.

    python benchmarks/coca_cost.py

``coca_ViT-B-32`` (254 M), random weights, 20 tokens: cost and no quality, no signal. End to end: picture, both text
halves, head. Every line is first held against open_clip's own modules at the same depths; then all lines are timed in
turn, in a new order each round. Writes ``benchmarks/results/coca_cost_<date>.md``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from coca_case import Case, Schedule, make_case, random_model, share_right
from coca_uncached import uncached_captions
from decode import spread, where
from decode_lines import ALIKE, Answer, Parts
from decode_measure import Measured, turns
from rich.progress import Progress
from targets import note, today

from lightning_mue.backbones import view
from lightning_mue.benchmark.limits import HEAD, answer_runs, least_seconds
from lightning_mue.benchmark.machine import measure_machine
from lightning_mue.benchmark.work import model_work
from lightning_mue.exits import attached
from lightning_mue.files import write_text
from lightning_mue.inference.encode import encode
from lightning_mue.inference.runtime import in_precision, make_runtime
from lightning_mue.inference.schedule import DecoderExits, decode
from lightning_mue.policy import ExitRule

RESULTS = Path(__file__).parent / "results"
MODEL = "open_clip:coca_ViT-B-32"
BASELINE = "no cache, torch fp32"
ENGINES = {
    "torch fp32": ("torch", None),
    "torch bf16": ("torch", "bfloat16"),
    "ORT fp32": ("onnxruntime", None),
    "ORT int8": ("onnxruntime", "int8"),
}
"""Line -> runtime and precision."""

LIMITS = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8"}
FASTER, PROMISED = 5.0, ("ORT fp32 ragged", "ORT int8 ragged")
PARTS = ("vision", "memory", "layers", "head")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, nargs="+", default=[7, 5], help="one number for each batch size")
    parser.add_argument("--steps", type=int, default=20, help="tokens of a caption")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=str(RESULTS), help="folder; only in the usual one are targets noted too")
    args = parser.parse_args(argv)
    if len(args.repeats) != len(args.batch_sizes):
        parser.error(f"--repeats must be one number for each of {args.batch_sizes}, got {args.repeats}")
    torch.set_num_threads(1)
    model, found = random_model(MODEL, args.seed), {}
    for size, repeats in zip(args.batch_sizes, args.repeats, strict=True):
        case = make_case(model, size, args.steps, args.seed)
        found[size] = measure(case, repeats, args.seed) | limits(case)
    target = Path(args.out) / f"coca_cost_{today()}.md"
    write_text(target, report(args, found))
    if target.parent == RESULTS:
        unit = f"times as fast as {BASELINE}: ragged depths, {args.steps} tokens, picture to tokens"
        for name, value in figures(found).items():
            note(name, value, FASTER, "higher", unit, command(args), where(1))
    print(target.read_text())


def command(args: argparse.Namespace) -> str:
    """Return the command line that measures this again."""
    sizes, repeats = (" ".join(map(str, numbers)) for numbers in (args.batch_sizes, args.repeats))
    return (
        f"python benchmarks/coca_cost.py --batch-sizes {sizes} --repeats {repeats} --steps {args.steps} "
        f"--seed {args.seed}"
    )


def lines(case: Case) -> dict[str, tuple[str, Callable[[], Answer]]]:
    """Return line -> its schedule and what captions the case once."""
    found: dict[str, tuple[str, Callable[[], Answer]]] = {}
    for name, precision in ((BASELINE, None), (BASELINE.replace("fp32", "bf16"), "bfloat16")):
        found[name] = ("full", _uncached(case, in_precision(case.model, precision)))
    for name, (runtime, precision) in ENGINES.items():
        run = _engine(case, in_precision(case.model, precision), runtime, precision)
        found |= {f"{name} {which}": (which, partial(run, depths)) for which, depths in case.schedules.items()}
    return found


def _uncached(case: Case, model: Any) -> Callable[[], Answer]:
    pixel_values = case.pixel_values.to(next(model.parameters()).dtype)

    def run() -> Answer:
        return Answer(uncached_captions(model.coca, pixel_values, case.start_id, (), case.steps)[:, 1:].tolist())

    return run


def _engine(case: Case, model: Any, name: str, precision: str | None) -> Callable[[Schedule], Answer]:
    backbone, exits = view(model), attached(model)
    runtime = make_runtime(name, backbone, precision)
    inputs = {"pixel_values": case.pixel_values.to(next(model.parameters()).dtype)}
    prompts = [[case.start_id]] * len(case.pixel_values)
    processors = backbone.token_processors(backbone.decode_settings(case.steps), None, prompts)

    def run(schedule: Schedule) -> Answer:
        watch, rules = Parts(time.process_time), {"vision": ExitRule.static(schedule.vision)}
        if schedule == case.schedules["full"]:
            rules = {}
        memory_BSD = encode(backbone, exits, inputs, rules, watch, None, runtime.streams).memory_BSD
        executor = runtime.executor(
            backbone, exits, memory_BSD, None, case.steps, processors, watch, beams=1, closed=None
        )
        forced = DecoderExits("static", lambda _step: {}, forced=schedule.decoder)
        record = decode(executor, forced, prompts, (), case.steps)
        return Answer(record.tokens, record.depths, record.pairs, watch.ms)

    return run


def measure(case: Case, repeats: int, seed: int) -> dict[str, Measured]:
    """Check every line, which warms it up, then time all of them in turn.

    Raises:
        ValueError: a line says something else.
    """
    ways, ms = lines(case), {}
    answers: dict[str, list[Answer]] = {}
    with torch.inference_mode(), Progress() as bars:
        bar = bars.add_task(f"batch {len(case.pixel_values)}", total=(1 + repeats) * len(ways))
        for name, (which, run) in ways.items():
            answers[name], ms[name] = [run()], []
            check(case, name, which, answers[name][0])
            bars.advance(bar)
        for name in turns(list(ways), repeats, seed):
            begin = time.process_time()
            answers[name].append(ways[name][1]())
            ms[name].append((time.process_time() - begin) * 1e3)
            bars.advance(bar)
    return {name: _measured(name, answers[name], ms[name]) for name in ways}


def _measured(name: str, answers: Sequence[Answer], ms: Sequence[float]) -> Measured:
    first, *timed = answers
    parts = {part: np.array([answer.parts[part] for answer in timed]) for part in first.parts}
    full = f"{name.rsplit(' ', 1)[0]} full" if first.depths else None
    return Measured(first, np.array(ms), parts, full)


def check(case: Case, name: str, which: str, answer: Answer) -> None:
    """Refuse a line whose tokens open_clip's own modules would not choose at the same depths.

    Raises:
        ValueError: what it must do, and what it did.
    """
    sizes = [len(tokens) for tokens in answer.tokens]
    if sizes != [case.steps] * len(case.pixel_values):
        raise ValueError(f"{name!r} must choose {case.steps} tokens in each row, got {sizes}")
    if answer.depths not in (None, case.schedules[which].decoder):
        raise ValueError(f"{name!r} must leave at the depths of {which!r}, left at others")
    right = share_right(case, case.schedules[which], torch.tensor(answer.tokens))
    needed = 1.0 if "fp32" in name else ALIKE
    if right < needed:
        raise ValueError(
            f"{name!r} must choose what open_clip's modules do for {needed:.0%} of tokens, got {right:.1%}"
        )


def limits(case: Case) -> dict[str, Measured]:
    """Return the least times of each schedule: weights read, and multiplied with, as fast as this machine does."""
    weights = sum(parameter.numel() for parameter in case.model.parameters())
    work = model_work(case.model, {"pixel_values": case.pixel_values})
    head, rows = measure_machine(HEAD, weights, clock=time.process_time), {}
    for name, precision in LIMITS.items():
        machine = measure_machine(precision, weights, clock=time.process_time)
        for which, depths in case.schedules.items():
            vision = {"vision": [depths.vision] * len(case.pixel_values)}
            seconds = least_seconds(answer_runs(work.streams, work.decoder, vision, depths.decoder), machine, head)
            parts = {part: np.array([of_part * 1e3]) for part, of_part in seconds.items()}
            answer = Answer([], depths.decoder)
            rows[f"limit {name} {which}"] = Measured(answer, sum(parts.values()), parts, f"limit {name} full")
    return rows


def figures(found: Mapping[int, Mapping[str, Measured]]) -> dict[str, float]:
    """Return figure -> times as fast as the loop without a cache, the median over rounds."""
    return {
        f"coca_b32_{name.split()[1]}_vs_uncached_b{size}": float(np.median(of_size[BASELINE].ms / of_size[name].ms))
        for name in PROMISED
        for size, of_size in found.items()
    }


def report(args: argparse.Namespace, found: Mapping[int, Mapping[str, Measured]]) -> str:
    """Return the page."""
    text = (
        f"# What a CoCa of real size costs: coca_ViT-B-32\n\n{where(1)}; {today()}. 254 M parameters, random weights, "
        f"{args.steps} tokens each, pictures of 224 px: 12 blocks of vision, 12 unimodal and 12 multimodal layers.\n\n"
        "Depths that are given: cost alone, no quality, no signal. One caption: picture to tokens, nothing ends it. "
        f"Every line chose what open_clip's own modules say at the same depths (in lower precision: {ALIKE:.0%} of the "
        "tokens at least). Time: CPU time of the process, all lines in turn, in a new order each round; medians with "
        "quartiles, ratios paired by round.\n\nstatic: vision left after block 6, every token half-way up the "
        "multimodal half. ragged: every token at a layer of its own there, half-way in the mean; what is missing is "
        "caught up just in time. first: vision after block 1, tokens after the first multimodal layer; the exits' "
        "adapters are paid. no cache: open_clip's loop, pictures once, then the whole text anew for every token. "
        "memory: the projection of the picture to K/V. layers: of both text halves. limit: weights read, and "
        "multiplied with, as fast as this machine was seen to do either, the head in 8 bits; nothing else.\n"
    )
    header = ("line", "ms", "x no cache", "x own full depth", *(f"{part} ms" for part in PARTS), "mean depth")
    for (size, of_size), repeats in zip(found.items(), args.repeats, strict=True):
        rows = "\n".join(f"| {' | '.join(_cells(name, of_size))} |" for name in of_size)
        text += f"\n## Batch {size}, {repeats} repeats\n\n| {' | '.join(header)} |\n"
        text += f"| --- |{' ---: |' * (len(header) - 1)}\n{rows}\n"
    text += "\n## Promises\n\n| figure | measured | promised | |\n| --- | ---: | ---: | --- |\n"
    for name, value in figures(found).items():
        text += f"| {name} | {value:.2f} | >= {FASTER:g} | {'kept' if value >= FASTER else 'not kept'} |\n"
    return text


def _cells(name: str, found: Mapping[str, Measured]) -> list[str]:
    this = found[name]
    shown = spread if len(this.ms) > 1 else _single
    cells = [name, shown(this.ms, 1), f"{np.median(found[BASELINE].ms / this.ms):.2f}"]
    if this.full is None or this.answer.depths is None:
        return [*cells, *["-"] * (len(PARTS) + 2)]
    depths = this.answer.depths
    cells += [shown(found[this.full].ms / this.ms, 2)]
    cells += [f"{np.median(this.parts[part]):.1f}" for part in PARTS]
    return [*cells, f"{sum(map(sum, depths)) / sum(map(len, depths)):.2f}"]


def _single(values: np.ndarray, digits: int) -> str:
    """Return the one value."""
    return f"{values[0]:.{digits}f}"


if __name__ == "__main__":
    main()
