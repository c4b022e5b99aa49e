"""What it costs to have exits: a training step, its memory, and inference that does not use them.

    python benchmarks/attached.py

Florence-2-base (231 M parameters, random weights) at 768 px, one sample, a prompt of 20 tokens and an answer of 20,
with three decoder exits and their gates as MultiExitSupervision trains them, beside the same model without. Steps are
timed in turn; memory is the peak of a process of its own. Writes ``benchmarks/results/attached_<date>.md`` and the
figures of ``targets.json``.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from decode import spread, where
from rich.progress import track
from targets import note, today
from torch import Tensor, nn

from lightning_mue.backbones import build_backbone, view
from lightning_mue.exits import attach_exits, attached, detach_exits
from lightning_mue.files import write_text
from lightning_mue.training.depths import Step
from lightning_mue.training.objective import objective
from lightning_mue.training.supervision import Supervision

RESULTS = Path(__file__).parent / "results"
EXITS = {"decoder": [1, 2, 3]}
PIXELS, PROMPT, ANSWER, IMAGE_TOKENS, IMAGE = 768, 20, 20, 577, 51289 - 1
PROMISED = {"step": 1.35, "memory": 1.15, "inference": 1.02}
"""Of the same without exits, at most."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", default=str(RESULTS), help="folder; only in the usual one are targets noted too")
    parser.add_argument("--peak", choices=["with", "without"], help="print the MB of one step, and nothing else")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.peak is not None:
        print(peak_mb(args.peak == "with"))
        return
    memory = {way: peak_of_a_process(way) for way in ("without", "with")}
    model, batch = florence2_base(), inputs()
    steps = in_turn(model, args.repeats, "training steps", lambda: one_step(model, batch))
    answers = in_turn(model, args.repeats, "answers", lambda: one_answer(model.eval(), batch))
    ratios = {
        "step": float(np.median(steps["with"] / steps["without"])),
        "memory": memory["with"] / memory["without"],
        "inference": float(np.median(answers["with"] / answers["without"])),
    }
    target = Path(args.out) / f"attached_{today()}.md"
    write_text(target, report(steps, answers, memory, ratios, args.repeats))
    print(f"{target.read_text()}\n{target}")
    if Path(args.out) == RESULTS:
        for name, value in ratios.items():
            command = f"python benchmarks/attached.py --repeats {args.repeats}"
            note(f"attached_{name}", value, PROMISED[name], "lower", "of the same without exits", command, where(1))


def florence2_base() -> Any:
    """Return the model in its published sizes; those of the tower are the defaults of its config."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 51289, "d_model": 768, "encoder_layers": 6, "decoder_layers": 6, "encoder_ffn_dim": 3072}
    sizes |= {"decoder_ffn_dim": 3072, "encoder_attention_heads": 12, "decoder_attention_heads": 12}
    text = {"model_type": "bart", "max_position_embeddings": 1024, **sizes}
    generation = {"decoder_start_token_id": 2, "eos_token_id": 2, "pad_token_id": 1, "max_new_tokens": ANSWER}
    parts = {"text_config": text, "vision_config": {"projection_dim": 768}, "generation_config": generation}
    return build_backbone({"model_type": "florence2", "image_token_id": IMAGE, **parts})


def inputs() -> dict[str, Tensor]:
    """Return one sample with its answer."""
    drawn = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 50000, (1, IMAGE_TOKENS + PROMPT), generator=drawn)
    ids[:, :IMAGE_TOKENS] = IMAGE
    pixels = torch.randn(1, 3, PIXELS, PIXELS, generator=drawn)
    labels = torch.randint(10, 50000, (1, ANSWER), generator=drawn)
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def one_step(model: Any, batch: dict[str, Tensor]) -> None:
    """Compute all gradients: of the model's own loss, or of deep supervision if it has exits."""
    model.train().zero_grad(set_to_none=True)
    exits = attached(model)
    if exits is None:
        loss = model(**batch).loss
    else:
        given = {name: tensor for name, tensor in batch.items() if name != "labels"}
        loss = objective(view(model), exits, given, batch["labels"], Step(), Supervision()).total
    loss.backward()


def one_answer(model: Any, batch: dict[str, Tensor]) -> None:
    """Answer at full depth, by the model's own ``generate``."""
    given = {name: tensor for name, tensor in batch.items() if name != "labels"}
    model.generate(**given, num_beams=1, do_sample=False, min_new_tokens=ANSWER, max_new_tokens=ANSWER)


def in_turn(model: nn.Module, repeats: int, what: str, run: Callable[[], None]) -> dict[str, np.ndarray]:
    """Return milliseconds of CPU time with and without exits, ``[repeats]``; the first round warms up."""
    taken: dict[str, list[float]] = {"without": [], "with": []}
    for turn in track(range(repeats + 1), description=what):
        for way in (list(taken), list(taken)[::-1])[turn % 2]:
            if way == "with":
                attach_exits(model, EXITS)
            begin = time.process_time()
            run()
            taken[way].append((time.process_time() - begin) * 1e3)
            if way == "with":
                detach_exits(model)
    return {way: np.array(ms[1:]) for way, ms in taken.items()}


def peak_mb(with_exits: bool) -> float:
    """Return how many MB a step takes at most, weights and gradients among them, libraries not."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = florence2_base()
    if with_exits:
        attach_exits(model, EXITS)
    one_step(model, inputs())
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def peak_of_a_process(way: str) -> float:
    """Return the same, measured where nothing else ran."""
    command = [sys.executable, __file__, "--peak", way]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def report(
    steps: dict[str, np.ndarray],
    answers: dict[str, np.ndarray],
    memory: dict[str, float],
    ratios: dict[str, float],
    repeats: int,
) -> str:
    """Return the page."""
    rows = (
        ("training step, ms", spread(steps["without"], 0), spread(steps["with"], 0), "step"),
        ("its memory, MB", f"{memory['without']:.0f}", f"{memory['with']:.0f}", "memory"),
        ("answer at full depth, ms", spread(answers["without"], 0), spread(answers["with"], 0), "inference"),
    )
    table = "\n".join(
        f"| {what} | {plain} | {ours} | {ratios[name]:.3f} | {PROMISED[name]} |" for what, plain, ours, name in rows
    )
    return (
        f"# What it costs to have exits\n\n{where(1)}; {today()}. Florence-2-base, random weights, {PIXELS} px, one "
        f"sample, a prompt of {PROMPT} tokens, an answer of {ANSWER}, float32; exits {EXITS} with gates. {repeats} "
        "repeats in turn, CPU time, medians with quartiles, ratios paired by round. A step: all gradients, no "
        "optimizer. Memory: the peak of a process that takes one step, weights and gradients among it.\n\n"
        "| | without | with exits | ratio | promised, at most |\n| --- | ---: | ---: | ---: | ---: |\n" + table + "\n"
    )


if __name__ == "__main__":
    main()
