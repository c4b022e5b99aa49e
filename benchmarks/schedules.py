"""What other orders of work would make of exits in a batch, reckoned from what calls of a layer cost, and measured.

    python benchmarks/schedules.py

Every token of every row leaves at a layer of its own, half of them in the mean (``decode.py``'s ragged depths, random
weights). What a call of a layer costs is timed (``call_cost.py``). Orders: ``just in time`` is the engine's; ``nothing
caught up`` leaves out what later tokens need, so its answers are others; ``fullest first`` lets rows go on alone, and
runs the layer for which most rows wait. Writes ``benchmarks/results/schedules_<shape>_<date>.md``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from call_cost import POSITIONS, Calls, timed_steps
from decode import read_shape, where
from decode_case import Case, Depths
from decode_lines import LINES, Parts, ort_executor
from rich.progress import track
from targets import today

from lightning_mue.files import write_text

RESULTS = Path(__file__).parent / "results"
PRECISIONS = {"ORT fp32": "float32", "ORT int8": "int8"}


def full_depth(depths: Depths, layers: int) -> Calls:
    """Every row takes every layer at every step."""
    yield from [(len(depths), len(depths))] * (len(depths[0]) * layers)


def nothing_caught_up(depths: Depths, layers: int) -> Calls:
    """Rows take the layers up to their depths, and leave holes in their K/V."""
    for of_step in zip(*depths, strict=True):
        for layer in range(1, layers + 1):
            if rows := sum(depth >= layer for depth in of_step):
                yield rows, rows


def just_in_time(depths: Depths, layers: int) -> Calls:
    """The engine's: rows step together, and what a layer misses of a row joins its call."""
    done = np.zeros((layers + 1, len(depths)), int)
    for step, of_step in enumerate(zip(*depths, strict=True), 1):
        for layer in range(1, layers + 1):
            if rows := [row for row, depth in enumerate(of_step) if depth >= layer]:
                yield len(rows), int((step - done[layer, rows]).sum())
                done[layer, rows] = step


def fullest_first(depths: Depths, layers: int) -> Calls:
    """Rows do not wait for each other's steps: the layer runs for which most rows wait, the deepest of equals."""
    done = np.zeros((layers + 1, len(depths)), int)
    step, layer = [0] * len(depths), [1] * len(depths)
    while live := [row for row in range(len(depths)) if step[row] < len(depths[row])]:
        waiting = [layer[row] for row in live]
        chosen = max(range(1, layers + 1), key=lambda k: (waiting.count(k), k))
        rows = [row for row in live if layer[row] == chosen]
        yield len(rows), sum(step[row] + 1 - int(done[chosen, row]) for row in rows)
        for row in rows:
            done[chosen, row] = step[row] + 1
            leaves = depths[row][step[row]] == chosen
            step[row], layer[row] = step[row] + leaves, 1 if leaves else chosen + 1


ORDERS: Mapping[str, Callable[[Depths, int], Calls]] = {
    "just in time": just_in_time,
    "nothing caught up": nothing_caught_up,
    "fullest first": fullest_first,
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="issue", help="of shapes.json")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", default=str(RESULTS), help="folder")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    lines = []
    for batch in args.batches:
        case = Case(read_shape(args.shape), batch, time.process_time, seed=2)
        lines += [line(case, name, args.repeats) for name in PRECISIONS]
    target = Path(args.out) / f"schedules_{args.shape}_{today()}.md"
    write_text(target, report(lines, args.shape, args.repeats))
    print(f"{target.read_text()}\n{target}")


@torch.inference_mode()
def line(case: Case, name: str, repeats: int) -> str:
    """Return one line of the table: a batch size in a precision."""
    make = ort_executor(PRECISIONS[name], True, case)
    silent = Parts(case.clock)
    cost = timed_steps(case, make(None, case.memory("fp32"), None, max(POSITIONS), (), silent), repeats).layer
    depths, layers = case.depths["ragged"], case.shape.layers
    full = cost.of(full_depth(depths, layers))
    reckoned = [cost.of(order(depths, layers)) / full for order in ORDERS.values()]
    runs = {schedule: LINES[f"{name} {schedule}"].prepare(case) for schedule in ("full", "ragged")}
    ms: dict[str, list[float]] = {schedule: [] for schedule in runs}
    for turn in track(range(repeats + 1), description=f"batch {case.batch}, {name}"):
        for schedule in (list(runs), list(runs)[::-1])[turn % 2]:
            taken = runs[schedule]().parts["layers"]
            if turn:  # the first warms
                ms[schedule].append(taken)
    measured = float(np.median(np.array(ms["ragged"]) / np.array(ms["full"])))
    half, rows = (case.batch + 1) // 2, case.batch
    costs = [cost.of([call]) for call in ((1, 1), (half, half), (rows, rows), (rows, 4 * rows))]
    cells = [f"{number:.2f}" for number in (*costs, *reckoned)]
    return f"| {case.batch} | {name} | {' | '.join(cells)} | {measured:.2f} |\n"


def report(lines: Sequence[str], shape: str, repeats: int) -> str:
    """Return the page."""
    return (
        f"# Orders of work in a batch\n\n{where(1)}; {today()}. Shape `{shape}`; every token of every row leaves at a "
        f"layer of its own, half of them in the mean; CPU time of the layers as a share of full depth's. Costs of a "
        f"call: medians of {repeats}. The orders are reckoned from them; 'measured' is the engine's decode, "
        f"{repeats} rounds, both depths in turn.\n\n"
        f"| batch | line | ms of one row | half of the rows | all | all, 4 positions each | {' | '.join(ORDERS)} | "
        f"measured |\n| ---: | --- |{' ---: |' * (5 + len(ORDERS))}\n{''.join(lines)}\n"
        "just in time: what the engine does. nothing caught up: later tokens miss K/V, and the answers are others. "
        "fullest first: rows do not wait for each other, and the layer runs for which most of them wait.\n"
    )


if __name__ == "__main__":
    main()
