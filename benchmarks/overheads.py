"""What no weights cost: the calls of a layer, and the libraries beside a bundle of graphs.

    python benchmarks/overheads.py

A decoder so narrow that its arithmetic is nothing, run by ONNX Runtime; and what is installed of the four libraries
that such a bundle answers with. Writes ``benchmarks/results/overheads_<date>.md`` and two figures of ``targets.json``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import torch
from decode import spread, where
from decode_case import START, Case, Shape
from targets import note, today

from lightning_mue.backbones import view
from lightning_mue.files import write_text
from lightning_mue.inference.runtime import make_runtime
from lightning_mue.inference.stopwatch import Stopwatch

RESULTS = Path(__file__).parent / "results"
NARROW = Shape("nothing: as narrow as can be", 6, 16, 2, 16, 64, 4, 20)
LIBRARIES = ("onnxruntime", "numpy", "tokenizers", "pillow")
CALLS_US, BUNDLE_MB = 40.0, 100.0
"""Promised: microseconds of a layer's calls; megabytes beside the weights."""


@dataclass(frozen=True)
class Layer:
    """Microseconds of a layer with one new position, ``[repeats]``: of ONNX Runtime's calls, and of everything."""

    calls: np.ndarray
    whole: np.ndarray


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2000)
    parser.add_argument("--out", default=str(RESULTS), help="folder; only in the usual one are targets noted too")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    layer, sizes = measure_layer(args.repeats), {name: installed_mb(name) for name in LIBRARIES}
    target = Path(args.out) / f"overheads_{today()}.md"
    write_text(target, report(layer, sizes, args.repeats))
    print(f"{target.read_text()}\n{target}")
    if Path(args.out) == RESULTS:
        command = "python benchmarks/overheads.py"
        calls, beside = float(np.median(layer.calls)), sum(sizes.values())
        note("call_overhead_layer_us", calls, CALLS_US, "lower", "us", command, where(1))
        note("bundle_libraries_mb", beside, BUNDLE_MB, "lower", "MB", command, where(1))


@torch.inference_mode()
def measure_layer(repeats: int) -> Layer:
    """Time one layer's three graphs, and the whole of it, in turn."""
    case = Case(NARROW, 1, time.process_time, seed=0)
    silent = Stopwatch(torch.device("cpu"), False)
    runtime = make_runtime("onnxruntime", view(case.model()), None)
    executor: Any = runtime.executor(view(case.model()), None, case.memory("fp32"), None, NARROW.steps, (), silent)
    executor.embed([0], 0, [[START] * NARROW.steps])
    for layer in range(1, NARROW.layers + 1):
        executor.run_layer(layer, [(0, NARROW.steps, [0])])
    sessions, h_ND = executor._sessions.layers[0], np.zeros((1, NARROW.width), np.float32)

    def calls() -> None:
        sessions.before(h_ND)
        sessions.between(h_ND, h_ND)
        sessions.after(h_ND, h_ND)

    last = NARROW.steps
    ways = {"calls": calls, "whole": lambda: executor.run_layer(1, [(last - 1, last, [0])])}
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, run in ways.items():
            taken[way].append(microseconds(run))
    return Layer(np.array(taken["calls"]), np.array(taken["whole"]))


def microseconds(run: Callable[[], object]) -> float:
    """Return how long a call took; by the wall clock, for CPU time is not counted so finely."""
    begin = time.perf_counter()
    run()
    return (time.perf_counter() - begin) * 1e6


def installed_mb(name: str) -> float:
    """Return the megabytes of a distribution's files as they are installed, compiled Python left out."""
    files = [file.locate() for file in distribution(name).files or () if file.suffix != ".pyc"]
    return sum(Path(str(file)).stat().st_size for file in files if Path(str(file)).is_file()) / 1e6


def report(layer: Layer, sizes: dict[str, float], repeats: int) -> str:
    """Return the page."""
    libraries = "\n".join(f"| {name} {distribution(name).version} | {mb:.1f} |" for name, mb in sizes.items())
    return (
        f"# What no weights cost\n\n{where(1)}; {today()}.\n\n"
        f"A decoder layer of width {NARROW.width}, one row, one new position; {repeats} times in turn, medians with "
        "quartiles. 'All of a layer' has the tables of rows and positions, K/V written in place, and both "
        "attentions too.\n\n| | us |\n| --- | ---: |\n"
        f"| ONNX Runtime's three calls | {spread(layer.calls, 1)} |\n| all of a layer | {spread(layer.whole, 1)} |\n\n"
        "What a bundle of graphs answers with, as it is installed; nothing of it is ours.\n\n"
        f"| library | MB |\n| --- | ---: |\n{libraries}\n| together | {sum(sizes.values()):.1f} |\n"
    )


if __name__ == "__main__":
    main()
