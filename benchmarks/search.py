"""How long the search for policies takes on a big trace: CPU seconds and memory of one process.

    python benchmarks/search.py

The trace is made up: 10,000 samples of 5,000 pictures, answers of up to 20 tokens, 12 vision, 6 encoder and 6 decoder
layers, every signal. Writes ``benchmarks/results/search_<date>.md``.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from pathlib import Path

import numpy as np
from targets import device, note, today

from lightning_mue.calibration import propose
from lightning_mue.files import write_text
from lightning_mue.latency import DecoderLatency, LatencyTable, StreamLatency
from lightning_mue.trace import StreamTrace, Trace

SIGNAL_MS = {"gate": 0.02, "similarity": 0.01, "confidence": 0.3, "margin": 0.3, "entropy": 0.3}
STREAM_MS = StreamLatency(1.0, 1.0, SIGNAL_MS)
LATENCY = LatencyTable(
    {"vision": STREAM_MS, "encoder": STREAM_MS}, DecoderLatency((1, 16), (1.0, 2.0), 0.3, 0.7, SIGNAL_MS)
)


def make_trace(samples: int, steps: int, seed: int) -> Trace:
    """Return a made-up trace whose scores tell something of what leaving would change."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, steps + 1, samples)

    def stream(layers: tuple[int, ...], num_layers: int, decoder: bool) -> StreamTrace:
        shape = (samples, steps, 1) if decoder else (samples, 1)
        needed = rng.beta(1, 8, shape) * num_layers  # the layer from which leaving changes nothing
        agree = needed < np.array(layers)
        signals = SIGNAL_MS if decoder else ("gate", "similarity")
        noisy = {
            s: 1 - needed / (np.array(layers) + 3) + rng.normal(0, 0.1, (*shape[:-1], len(layers))) for s in signals
        }
        scores = {s: values.clip(0, 1).astype(np.float32) for s, values in noisy.items()}
        same = (agree | (np.arange(steps) >= lengths[:, None])[..., None]).all(1) if decoder else agree
        return StreamTrace(layers, num_layers, scores, np.where(same, 0.8, 0.5), same, agree if decoder else None)

    streams = {
        "vision": stream((2, 4, 6, 8), 12, False),
        "encoder": stream((1, 2, 3, 4, 5), 6, False),
        "decoder": stream((1, 2, 3, 4, 5), 6, True),
    }
    names = [f"s{i:06d}" for i in range(samples)]
    clusters = [f"c{i // 2:06d}" for i in range(samples)]
    full, prompts = np.full(samples, 0.8), np.zeros(samples, dtype=np.int64)
    meta = {"metric": "accuracy", "decode": {"max_new_tokens": steps}}
    return Trace(names, clusters, full, lengths, prompts, streams, meta)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    trace, seconds = make_trace(args.samples, args.steps, 0), []
    for _ in range(args.repeats):
        begin = time.process_time()
        proposal = propose(trace, LATENCY, "accuracy", 0.98, 0.95)
        seconds.append(time.process_time() - begin)
    gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    median, low, high = statistics.median(seconds), min(seconds), max(seconds)
    text = (
        f"# The search for policies\n\n{device()}, 1 thread, numpy {np.__version__}; {today()}. A made-up trace of "
        f"{args.samples:,} samples and {int(trace.lengths.sum()):,} tokens.\n\n"
        f"* policies: {proposal.searched:,} searched, {len(proposal.frontier)} on the frontier, "
        f"{len(proposal.chain)} in the chain\n"
        f"* CPU seconds: median {median:.2f} ({low:.2f} to {high:.2f} in {args.repeats} repeats)\n"
        f"* memory of the process at its highest: {gib:.2f} GiB\n"
    )
    write_text(Path(__file__).parent / "results" / f"search_{today()}.md", text)
    command = "python benchmarks/search.py"
    where = f"{device()}, 1 thread"
    note("search_policies", proposal.searched, 100_000, "higher", "policies searched", command, where)
    note("search_seconds", median, 5.0, "lower", f"CPU s on {args.samples:,} samples", command, where)
    note("search_memory", gib, 2.0, "lower", "GiB of the process", command, where)
    print(text)


if __name__ == "__main__":
    main()
