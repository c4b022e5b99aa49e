"""What verified mode gains: exits draft, the last layer settles, the tokens are those of full depth.

    python benchmarks/verified.py

The issue's decoder (``shapes.json``) with random weights, of which the layers above the first are damped: the more, the
more often what the first layer would choose is what the last one chooses. So drafts are right as often as is asked for,
by the model's own arithmetic. Every answer is compared with full depth's, token for token, before anything is timed.
Writes ``benchmarks/results/verified_<date>.md`` and the figures of ``targets.json``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from decode import read_shape, spread, where
from decode_case import START, Case
from rich.progress import track
from targets import note, today
from torch import nn

from lightning_mue.backbones import view
from lightning_mue.files import write_text
from lightning_mue.inference.drafting import LONGEST, DraftLength, StepCost, measure_cost
from lightning_mue.inference.runtime import RUNTIMES, Runtime, make_runtime
from lightning_mue.inference.schedule import DecodeRecord, DecoderExits, decode
from lightning_mue.inference.stopwatch import Stopwatch
from lightning_mue.inference.torch_executor import TorchExecutor

RESULTS = Path(__file__).parent / "results"
DAMPING = (0.1, 0.04, 0.035, 0.03, 0.02, 0.01)
"""What the outputs of the upper layers' attentions and FFNs are multiplied with."""
TARGET, LEAST = 1.5, 0.8
"""Times as fast as full depth, where drafts are right so often."""


@dataclass(frozen=True)
class Row:
    """One line of the table: milliseconds of CPU time, ``[repeats]``, how drafts fared, what they could gain."""

    damping: float
    batch: int
    full: np.ndarray
    verified: np.ndarray
    acceptance: float
    length: int
    distinct: int
    most: float


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="issue", help="of shapes.json")
    parser.add_argument("--runtime", default="onnxruntime", choices=list(RUNTIMES))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", default=str(RESULTS), help="folder; only in the usual one are targets noted too")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = []
    for batch in args.batches:
        for damping in DAMPING:
            case = Case(read_shape(args.shape), batch, time.process_time, seed=0)
            damp(case.model(), damping)
            rows.append(measure(case, args.runtime, damping, args.repeats))
    target = Path(args.out) / f"verified_{args.shape}_{today()}.md"
    write_text(target, report(rows, args.shape, args.runtime, args.repeats))
    print(f"{target.read_text()}\n{target}")
    if Path(args.out) == RESULTS:
        for batch in args.batches:
            value = float(np.median([r.full / r.verified for r in kept(rows, batch)]))
            command = f"python benchmarks/verified.py --batches {batch}"
            note(f"verified_vs_full_b{batch}", value, TARGET, "higher", "times as fast", command, where(1))


@torch.no_grad()
def damp(model: nn.Module, damping: float) -> None:
    """Let the layers above the first change the states less."""
    for layer in model.model.language_model.decoder.layers[1:]:
        for linear in (layer.self_attn.out_proj, layer.encoder_attn.out_proj, layer.fc2):
            linear.weight.mul_(damping)


@torch.inference_mode()
def measure(case: Case, name: str, damping: float, repeats: int) -> Row:
    """Time full depth and verified decodes in turn.

    Raises:
        ValueError: they chose other tokens.
    """
    backbone, steps, prompts = view(case.model()), case.shape.steps, [[START]] * case.batch
    runtime = make_runtime(name, backbone, None)
    cost = measure_cost(executor(runtime, case, LONGEST), case.batch, clock=time.process_time)
    drafting = Counted(case.shape.layers, 1, cost)
    full = DecoderExits("static", lambda step: {})
    ways = {
        "full": partial(timed, lambda: decode(executor(runtime, case, steps), full, prompts, [], steps)),
        "verified": partial(
            timed,
            lambda: decode(
                executor(runtime, case, steps),
                DecoderExits("static", lambda step: {1: 0.0}, drafting=drafting),
                prompts,
                [],
                steps,
            ),
        ),
    }
    ms: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(3):  # the length of the cycles settles
        expected, found = (way()[1] for way in ways.values())
        if found.tokens != expected.tokens:
            raise ValueError(
                f"Verified decoding must choose full depth's tokens, got {found.tokens}, {expected.tokens}"
            )
    for turn in track(range(repeats), description=f"batch {case.batch}, damping {damping}"):
        for way in (list(ways), list(ways)[::-1])[turn % 2]:
            taken, record = ways[way]()
            ms[way].append(taken)
    agreed = record if record.drafted else ways["verified"]()[1]
    distinct = len({token for row in agreed.tokens for token in row})
    most = at_most(float(np.median(ms["full"])), cost, case, drafting.share)
    times = (np.array(ms["full"]), np.array(ms["verified"]))
    return Row(damping, case.batch, *times, drafting.share, drafting.length(), distinct, most)


class Counted(DraftLength):
    """Counts drafts too: what chooses a length forgets what was long ago, and begins with an opinion.

    Attributes:
        right: drafts that the last layer chose too.
        wrong: drafts that it did not, each after right ones alone.
    """

    right, wrong = 0, 0

    def saw(self, depths: Sequence[int], agreed: int) -> None:
        """Count, and learn."""
        super().saw(depths, agreed)
        self.right, self.wrong = self.right + agreed, self.wrong + (agreed < len(depths))

    @property
    def share(self) -> float:
        """How often a draft was right, given that those before it were."""
        return self.right / max(1, self.right + self.wrong)


def at_most(full_ms: float, cost: StepCost, case: Case, acceptance: float) -> float:
    """Return how many times as fast as full depth it could be if positions beside the first cost nothing at all.

    Drafts after layer 1 still run it and the head one by one, and the memory is projected all the same.
    """
    layers, steps = case.shape.layers, case.shape.steps
    free = StepCost((cost.layer[0], 0.0), (cost.head[0], 0.0))
    best = min(free.cycle(k, 1, layers) / sum(acceptance**i for i in range(k)) for k in range(1, LONGEST + 1))
    return full_ms / (full_ms - steps * (free.cycle(1, layers, layers) - best))


def executor(runtime: Runtime, case: Case, positions: int) -> TorchExecutor:
    """Return the executor of one decode."""
    memory_BSD = case.memory("fp32")
    silent = Stopwatch(memory_BSD.device, False)
    return runtime.executor(view(case.model()), None, memory_BSD, None, positions, (), silent)


def timed(run: Callable[[], DecodeRecord]) -> tuple[float, DecodeRecord]:
    """Return milliseconds of CPU time and what was decoded."""
    begin = time.process_time()
    record = run()
    return (time.process_time() - begin) * 1e3, record


def kept(rows: Sequence[Row], batch: int) -> list[Row]:
    """Return the line of a batch size that the promise is about: drafts as often right as it says, and hardly more."""
    able = [row for row in rows if row.batch == batch and row.acceptance >= LEAST]
    return sorted(able, key=lambda row: row.acceptance)[:1]


def report(rows: Sequence[Row], shape: str, runtime: str, repeats: int) -> str:
    """Return the page."""
    text = (
        f"# What verified mode gains\n\n{where(1)}; {today()}. Shape `{shape}`, runtime {runtime}, float32, {repeats} "
        "repeats; CPU time, both in turn; medians with quartiles, ratios paired by round. Drafts leave after layer 1; "
        "the last layer settles them, and every answer was full depth's, token for token. The upper layers of the "
        "random model are damped, so that drafts are right as often as 'acceptance' says (a draft, given that those "
        "before it were right). 'Cycle': positions settled together, chosen from what steps cost here. "
        "'At most': if a cycle's positions beside its first cost nothing in the layers that settle them; layer 1 and "
        "the head of each draft remain, and the memory's projection. It is reckoned from steps at the beginning of an "
        "answer, where they cost least.\n\n"
        "| batch | damping | acceptance | cycle | different tokens | full depth, ms | verified, ms | times as fast "
        "| at most |\n"
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
    )
    for row in rows:
        cells = (f"{row.acceptance:.2f}", str(row.length), str(row.distinct), spread(row.full, 1))
        times = (spread(row.verified, 1), spread(row.full / row.verified, 2), f"{row.most:.2f}")
        text += f"| {row.batch} | {row.damping} | {' | '.join((*cells, *times))} |\n"
    return text


if __name__ == "__main__":
    main()
