import numpy as np
import pytest

from lightning_mue.latency import DecoderLatency, LatencyTable, StreamLatency
from lightning_mue.trace import StreamTrace, Trace


def build_trace(n=300, steps=6, seed=0, clusters=None, difficulty=0.1):
    """Return a made-up trace: hard samples disagree early, and their scores are lower (as scores should be)."""
    rng = np.random.default_rng(seed)
    full = (rng.random(n) < 0.7).astype(np.float64)
    lengths = rng.integers(2, steps + 1, n)

    def stream(layers, num_layers, shape):
        hard = rng.random((*shape, 1))
        wrong = rng.random((*shape, len(layers))) < difficulty * hard * np.linspace(2, 0.3, len(layers))
        noise = 0.15 * rng.standard_normal(wrong.shape)
        gate = np.clip(0.9 - 0.5 * wrong - 0.2 * hard + noise, 0, 1).astype(np.float32)
        similarity = np.clip(0.5 + 0.4 * gate + 0.2 * rng.random(wrong.shape), -1, 1).astype(np.float32)
        scores = {"gate": gate, "similarity": similarity}
        changed = wrong if len(shape) == 1 else (wrong & (np.arange(steps) < lengths[:, None])[..., None]).any(1)
        score_at = {"accuracy": np.where(changed & (rng.random(changed.shape) < 0.6), 1 - full[:, None], full[:, None])}
        agree = None if len(shape) == 1 else ~wrong
        return StreamTrace(layers, num_layers, scores, score_at, ~changed, agree)

    streams = {
        "decoder": stream((1, 2, 4), 6, (n, steps)),
        "encoder": stream((2, 4), 6, (n,)),
        "vision": stream((3, 6, 9), 12, (n,)),
    }
    names = [f"s{i:05d}" for i in range(n)]
    groups = names if clusters is None else [f"c{i % clusters:05d}" for i in range(n)]
    return Trace(
        names,
        groups,
        [""] * n,
        {"accuracy": full},
        lengths,
        np.zeros(len(names), dtype=np.int64),
        streams,
        {"fingerprint": "abc"},
    )


@pytest.fixture(scope="session")
def make_trace():
    return build_trace


@pytest.fixture(scope="session")
def latency():
    decoder = DecoderLatency((1, 2, 4, 8), (1.0, 1.1, 1.4, 2.5), 0.3, 2.0, {"gate": 0.05, "similarity": 0.02})
    streams = {
        "encoder": StreamLatency(1.0, 2.0, {"gate": 0.05, "similarity": 0.02}),
        "vision": StreamLatency(5.0, 3.0, {"gate": 0.05, "similarity": 0.02}),
    }
    return LatencyTable(streams, decoder, "made up", 1)
