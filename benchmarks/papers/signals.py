"""Which signal tells harmless exits from harmful ones: AUROC at every exit, and the depth a given agreement costs.

    python -m papers.signals --ckpt_path runs/flickr8k_caption/last.ckpt --name flickr8k_caption

(from the folder ``benchmarks``). One full-depth pass over the test data records every signal; nothing is tuned on it
but one threshold per row of the second table, common to all exits. Decoder: harmless = the exit chooses the last
layer's token, along the model's own path (a simulation: while tokens agree it is exact). Other streams: harmless = the
answer stays.
Writes ``benchmarks/results/signals_<name>_<date>.md``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from runs import load_run
from scipy.stats import mannwhitneyu
from targets import device, note, today

from lightning_mue.backbones import view
from lightning_mue.files import write_text
from lightning_mue.inference.record import record
from lightning_mue.trace import StreamTrace, Trace

AGREEMENTS = (0.90, 0.95, 0.98, 0.99)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt_path", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--data", help="the shards, if they lie elsewhere than in training")
    parser.add_argument("--batches", type=int, default=None, help="of the test data; all if not given")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    module, data = load_run(args.ckpt_path, **({} if args.data is None else {"train": args.data}))
    data.setup("test")
    prefix = data.answer_constraint(view(module.model).decode_settings(None).end_ids[0])
    batches = list(data.test_dataloader())[: args.batches]
    parts = [
        record(module.model, b, b["sample_id"], b["cluster"], lambda s: {}, None, prefix)
        for b in track(batches, "recording")
    ]
    trace = Trace.merge(parts)
    text = (
        f"# {args.name}: exit signals\n\n{device()}; torch {torch.__version__}; {today()}. {len(trace)} test samples.\n"
    )
    for name, stream in trace.streams.items():
        scores, harmless = rows(trace, stream)
        text += f"\n## {name}: AUROC for 'harmless' at each exit\n\n{auroc_table(stream, scores, harmless)}"
        text += (
            f"\n## {name}: mean depth for a given share of harmless exits\n\n{depth_table(stream, scores, harmless)}"
        )
        if name == "decoder" and "gate" in scores:
            depth = depth_at(stream, scores["gate"], harmless, 0.99)
            where = f"{device()}, 1 thread"
            command = f"python -m papers.signals --ckpt_path CKPT --name {args.name}"
            note(
                f"{args.name}_depth_at_99_agreement",
                depth,
                2.2,
                "lower",
                "mean decoder depth, threshold read off the same data",
                command,
                where,
            )
    target = Path(__file__).parents[1] / "results" / f"signals_{args.name}_{today()}.md"
    write_text(target, text)
    print(text)


def rows(trace: Trace, stream: StreamTrace) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return signal -> scores and harmlessness, ``[rows, E]``: a row is a token (decoder) or a sample."""
    if stream.agree is None:
        return stream.scores, stream.same_at
    taken = np.arange(stream.agree.shape[1]) < trace.lengths[:, None]
    return {s: v[taken] for s, v in stream.scores.items()}, stream.agree[taken]


def auroc(scores: np.ndarray, harmless: np.ndarray) -> float:
    """Return the chance that a harmless exit scores above a harmful one; NaN without both."""
    good, bad = scores[harmless], scores[~harmless]
    return float(mannwhitneyu(good, bad).statistic / (len(good) * len(bad))) if len(good) and len(bad) else np.nan


def auroc_table(stream: StreamTrace, scores: dict[str, np.ndarray], harmless: np.ndarray) -> str:
    lines = [
        "| signal | " + " | ".join(f"exit {k}" for k in stream.layers) + " |",
        "| --- |" + " --- |" * len(stream.layers),
    ]
    lines.append("| share harmless | " + " | ".join(f"{h:.3f}" for h in harmless.mean(0)) + " |")
    for signal, values in sorted(scores.items()):
        found = [auroc(values[:, e], harmless[:, e]) for e in range(len(stream.layers))]
        lines.append(f"| {signal} | " + " | ".join(f"{x:.3f}" for x in found) + " |")
    return "\n".join(lines) + "\n"


def depth_table(stream: StreamTrace, scores: dict[str, np.ndarray], harmless: np.ndarray) -> str:
    lines = ["| signal | " + " | ".join(f"{a:.0%}" for a in AGREEMENTS) + " |", "| --- |" + " --- |" * len(AGREEMENTS)]
    static = [
        next((k for k, h in zip(stream.layers, harmless.mean(0), strict=True) if h >= a), stream.num_layers)
        for a in AGREEMENTS
    ]
    lines.append("| best static | " + " | ".join(map(str, static)) + " |")
    for signal, values in sorted(scores.items()):
        found = [depth_at(stream, values, harmless, a) for a in AGREEMENTS]
        lines.append(f"| {signal} | " + " | ".join(f"{x:.2f}" for x in found) + " |")
    first = np.append(harmless, np.ones((len(harmless), 1), dtype=bool), axis=1).argmax(1)
    oracle = np.append(stream.layers, stream.num_layers)[first].mean()
    lines.append(f"| oracle (100 %) | {oracle:.2f} |" + " |" * (len(AGREEMENTS) - 1))
    return "\n".join(lines) + "\n"


def depth_at(stream: StreamTrace, scores: np.ndarray, harmless: np.ndarray, asked: float) -> float:
    """Return the least mean depth at which one threshold for all exits keeps ``asked`` of the rows harmless."""
    layers = np.append(stream.layers, stream.num_layers)
    best = float(stream.num_layers)
    safe = np.append(harmless, np.ones((len(harmless), 1), dtype=bool), axis=1)
    for threshold in np.unique(np.quantile(scores, np.linspace(0, 1, 400))):
        column = np.append(scores >= threshold, np.ones((len(scores), 1), dtype=bool), axis=1).argmax(1)
        if safe[np.arange(len(safe)), column].mean() >= asked:
            best = min(best, float(layers[column].mean()))
    return best


if __name__ == "__main__":
    main()
