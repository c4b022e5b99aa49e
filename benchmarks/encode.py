"""What the layers before the decoder cost: torch in each precision beside graphs in ONNX Runtime, and an exit half-way.

    python benchmarks/encode.py

The encoder (6 layers of width 768, 597 tokens) and the vision blocks (DaViT's long stage as in Florence-2-base, 9 of
them, at 224 and 768 px), one sample, random weights: cost alone, no quality, no signal. Every line first has to give
the float32 states. All lines are timed in turn, in a new order each round. ``limit``: the weights read and multiplied
with as fast as this machine was seen to do either; nothing else, and nothing is timed.
Writes ``benchmarks/results/encode_<date>.md``.
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
from decode import spread, where
from decode_case import changed_copy
from decode_limits import PRECISIONS
from rich.progress import track
from targets import note, today
from torch import Tensor, nn

from lightning_mue.backbones import EncoderStream, StreamState, build_backbone, view
from lightning_mue.benchmark.machine import measure_machine
from lightning_mue.benchmark.work import counted
from lightning_mue.files import write_text
from lightning_mue.inference.sessions import StreamSessions

RESULTS = Path(__file__).parent / "results"
BASELINE = "torch fp32"
FAR = {"fp32": 1e-4, "bf16": 0.2, "int8": 0.3}
"""How far, relative in the root mean square, states of a precision may lie from float32's."""

CASES = {
    "encoder": ("encoder", (597, 768), None),
    "vision_224px": ("vision", (14 * 14, 512), (14, 14)),
    "vision_768px": ("vision", (48 * 48, 512), (48, 48)),
}
"""Name -> stream, tokens and width, height and width of the picture."""

TARGETS = {"fp32": 1.9, "int8": 4.0}

Run = Callable[[int], Tensor]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--out", default=str(RESULTS), help="folder; only in the usual one are targets noted too")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    model = random_model()
    copies = {precision: changed_copy(model, precision, "sdpa") for precision in ("bf16", "int8")} | {"fp32": model}
    found = {name: measure(copies, name, args.repeats) | limits(copies["fp32"], name) for name in args.cases}
    target = Path(args.out) / f"encode_{today()}.md"
    write_text(target, report(found, args.repeats))
    if target.parent == RESULTS:
        for case, of_case in found.items():
            for name, value, wanted in figures(of_case):
                command = f"python benchmarks/encode.py --repeats {args.repeats}"
                note(f"encode_{case}_{name}", value, wanted, "higher", "times as fast", command, where(1))
    print(target.read_text())


def random_model() -> Any:
    """Return a Florence-2 with the encoder of the issue and the vision tower of Florence-2-base."""
    text = {
        "model_type": "bart",
        "vocab_size": 1000,
        "d_model": 768,
        "encoder_layers": 6,
        "encoder_attention_heads": 12,
        "encoder_ffn_dim": 3072,
        "decoder_layers": 1,
        "decoder_attention_heads": 12,
        "decoder_ffn_dim": 768,
    }
    vision = {"depths": [1, 1, 9, 1], "projection_dim": 768}
    torch.manual_seed(0)
    model = build_backbone({"model_type": "florence2", "text_config": text, "vision_config": vision})
    return model.eval().requires_grad_(False)


def lines(copies: Mapping[str, nn.Module], case: str) -> tuple[dict[str, Run], int]:
    """Return name -> what runs the first so many layers on one sample, and how many there are."""
    stream, (tokens, width), grid = CASES[case]
    h_BTD = torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(0))

    def run(of: EncoderStream | StreamSessions, dtype: torch.dtype, depth: int) -> Tensor:
        state = StreamState(h_BTD.to(dtype), grid=grid)
        for k in range(1, depth + 1):
            state.h_BTD = of.layer(k, state)
        return state.h_BTD

    def of(precision: str) -> EncoderStream:
        return next(s for s in view(copies[precision]).encoders if s.name == stream)

    runs: dict[str, Run] = {}
    for precision in ("fp32", "bf16", "int8"):
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        runs[f"torch {precision}"] = partial(run, of(precision), dtype)
    for precision, name in (("float32", "fp32"), ("int8", "int8")):
        runs[f"ORT {name}"] = partial(run, StreamSessions(of("fp32"), precision), torch.float32)
    return runs, of("fp32").num_layers


def measure(copies: Mapping[str, nn.Module], case: str, repeats: int) -> dict[tuple[str, str], np.ndarray]:
    """Return (line, ``full`` or ``half``) -> milliseconds of CPU time, ``[repeats]``.

    Raises:
        ValueError: a line computes something else.
    """
    runs, layers = lines(copies, case)
    todo = {(name, part): layers if part == "full" else layers // 2 for name in runs for part in ("full", "half")}
    ms: dict[tuple[str, str], list[float]] = {key: [] for key in todo}
    rng = np.random.default_rng(0)
    with torch.inference_mode():
        for (name, _), depth in todo.items():
            check(name, runs[name](depth).float(), runs[BASELINE](depth))
        for _ in track(range(repeats), description=case):
            for i in rng.permutation(len(todo)):
                key = list(todo)[i]
                begin = time.process_time()
                runs[key[0]](todo[key])
                ms[key].append((time.process_time() - begin) * 1e3)
    return {key: np.array(values) for key, values in ms.items()}


def limits(model: nn.Module, case: str) -> dict[tuple[str, str], np.ndarray]:
    """Return ("limit ...", ``full`` or ``half``) -> the least milliseconds, ``[1]``."""
    stream, (tokens, width), grid = CASES[case]
    of = next(s for s in view(model).encoders if s.name == stream)
    state = StreamState(torch.zeros(1, tokens, width), grid=grid)
    work = [counted(model, partial(of.layer, k, state))[1] for k in range(1, of.num_layers + 1)]
    found = {}
    for precision, name in PRECISIONS.items():
        machine = measure_machine(name, sum(layer.weights for layer in work), clock=time.process_time)
        ms = [1e3 * machine.seconds(layer) for layer in work]
        found[f"limit {precision}", "full"] = np.array([sum(ms)])
        found[f"limit {precision}", "half"] = np.array([sum(ms[: len(ms) // 2])])
    return found


def check(name: str, found: Tensor, expected: Tensor) -> None:
    """Refuse a line whose states are not float32's, as near as its precision allows.

    Raises:
        ValueError: how far they are.
    """
    far = float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())
    if not far < (most := FAR[name.split()[1]]):
        raise ValueError(f"{name!r} must give the float32 states to {most:g} (relative, rms), they are {far:.3g} off")


def figures(found: Mapping[tuple[str, str], np.ndarray]) -> list[tuple[str, float, float]]:
    """Return the promised figures: name, value, target."""
    result = []
    for precision, target in TARGETS.items():
        full = found[f"ORT {precision}", "full"]
        result.append((f"{precision}_vs_torch_fp32", float(np.median(found[BASELINE, "full"] / full)), target))
        half = float(np.median(full / found[f"ORT {precision}", "half"]))
        result.append((f"{precision}_exit_half_way", half, 1.9))
    return result


def report(found: Mapping[str, Mapping[tuple[str, str], np.ndarray]], repeats: int) -> str:
    """Return the page."""
    text = (
        f"# What the layers before the decoder cost\n\n{where(1)}; {today()}. Random weights, one sample, {repeats} "
        "repeats; CPU time, all lines in turn, in a new order each round; medians with quartiles, ratios paired by "
        "round. 'Half': the same line left after half of its layers (rounded down), and what that gains.\n"
    )
    for case, of_case in found.items():
        tokens, width = CASES[case][1]
        text += f"\n## {case}: {tokens} tokens of width {width}\n\n| line | ms | of {BASELINE} | times as fast | half: "
        text += "times as fast |\n| --- | ---: | ---: | ---: | ---: |\n"
        for name in dict.fromkeys(name for name, _ in of_case):
            full, half = of_case[name, "full"], of_case[name, "half"]
            ratio = full / of_case[BASELINE, "full"]
            cells = (spread(full, 1), spread(ratio, 3), f"{np.median(1 / ratio):.2f}", spread(full / half, 2))
            text += f"| {name} | {' | '.join(cells)} |\n"
        text += "\n| figure | measured | promised | |\n| --- | ---: | ---: | --- |\n"
        for name, value, target in figures(of_case):
            text += f"| {name} | {value:.2f} | >= {target} | {'kept' if value >= target else 'not kept'} |\n"
    return text


if __name__ == "__main__":
    main()
