"""What asking costs: the signals' share of a step.

    python benchmarks/decode_signals.py

The decodes of ``decode.py`` in ONNX Runtime, ragged, with exits after every other layer: at each of them every row that
is still there is asked, and leaves where its given depth says. So what a signal costs is seen and what it decides is
not. Writes ``benchmarks/results/decode_signals_<shape>_<date>.md`` and the figures of ``targets.json``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from decode import PROMISED, read_shape, spread, where
from decode_case import START, Case
from decode_lines import Parts
from rich.progress import track
from targets import note, today

from lightning_mue.backbones import view
from lightning_mue.exits import attach_exits
from lightning_mue.files import write_text
from lightning_mue.inference.schedule import Block, DecoderExits, decode
from lightning_mue.inference.sessions import decoder_sessions, make_executor

RESULTS = Path(__file__).parent / "results"
SIGNALS = ("similarity", "gate", "margin")
PROMISED_SIGNALS, TARGET = SIGNALS[:2], 0.03
PRECISIONS = ("float32", "int8")


class Asking:
    """An executor that asks a signal wherever an exit is, as a schedule without given depths does.

    Args:
        executor: that computes and scores.
        signal: what is asked.
        exits: after which layers.
    """

    def __init__(self, executor: Any, signal: str, exits: Sequence[int]) -> None:
        self._executor, self._signal, self._exits = executor, signal, exits
        self.num_layers, self.embed, self.choose = executor.num_layers, executor.embed, executor.choose

    def run_layer(self, layer: int, pending: Sequence[Block]) -> None:
        """Push blocks through a layer, and ask at their last positions."""
        self._executor.run_layer(layer, pending)
        if layer in self._exits:
            places = [(row, last - 1) for _, last, rows in pending for row in rows]
            self._executor.score(self._signal, layer, places)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default=PROMISED, help="of shapes.json")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", default=str(RESULTS), help="folder; only in the usual one are targets noted too")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    shares = {
        batch: measure(Case(read_shape(args.shape), batch, time.process_time, 2), args.repeats)
        for batch in args.batch_sizes
    }
    target = Path(args.out) / f"decode_signals_{args.shape}_{today()}.md"
    write_text(target, report(args.shape, args.repeats, shares))
    print(f"{target.read_text()}\n{target}")
    if Path(args.out) == RESULTS and args.shape == PROMISED:
        for batch, of_batch in shares.items():
            worst = max(float(np.median(of_batch["int8", signal])) for signal in PROMISED_SIGNALS)
            unit = f"share of a step in int8, the dearer of {' and '.join(PROMISED_SIGNALS)}"
            note(
                f"signals_share_b{batch}", worst, TARGET, "lower", unit, "python benchmarks/decode_signals.py", where(1)
            )


@torch.inference_mode()
def measure(case: Case, repeats: int) -> dict[tuple[str, str], np.ndarray]:
    """Return (precision, signal) -> the signal's share of a decode, ``[repeats]``; the lines take turns."""
    model = case.model()
    exits = attach_exits(model, {"decoder": [*range(1, case.shape.layers, 2)]})
    backbone, memory_BSD = view(model), case.memory("fp32")
    sessions = {precision: decoder_sessions(backbone.decoder, precision) for precision in PRECISIONS}
    given = DecoderExits("static", lambda _step: {}, forced=case.depths["ragged"])
    found: dict[tuple[str, str], list[float]] = {(p, s): [] for p in PRECISIONS for s in SIGNALS}
    for turn in track(range(1 + repeats), description=f"batch {case.batch}"):
        for (precision, signal), shares in found.items():
            watch = Parts(case.clock)
            with watch.part("total"):
                what = (backbone, exits, memory_BSD, None, case.shape.steps, (), watch)
                executor = Asking(make_executor(sessions[precision], *what), signal, exits.layers["decoder"])
                decode(executor, given, [[START]] * case.batch, (), case.shape.steps)
            if turn:
                shares.append(watch.ms["signals"] / watch.ms["total"])
    return {line: np.array(shares) for line, shares in found.items()}


def report(shape: str, repeats: int, shares: Mapping[int, Mapping[tuple[str, str], np.ndarray]]) -> str:
    """Return the page."""
    text = (
        f"# What asking costs\n\n{where(1)}; {today()}. Shape `{shape}`, ONNX Runtime, ragged depths, {repeats} "
        "repeats; CPU time of `score` over that of whole decodes, projection of the memory and head included; medians "
        "with quartiles. "
        "Every exit on the way asks all rows that are still there. The margin needs all logits at every exit, in "
        "float32: what the others are for.\n\n"
        f"| batch | precision | {' | '.join(SIGNALS)} |\n| ---: | --- | {'---: | ' * len(SIGNALS)}\n"
    )
    for batch, of_batch in shares.items():
        for precision in PRECISIONS:
            cells = [spread(100 * of_batch[precision, signal], 2) + " %" for signal in SIGNALS]
            text += f"| {batch} | {precision} | {' | '.join(cells)} |\n"
    return text


if __name__ == "__main__":
    main()
