"""Rows: a stream's decisions, flat: one row for every sample or, in the decoder, for every token really made."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lightning_mue.trace import Trace


@dataclass(frozen=True)
class StreamRows:
    """One stream of a trace, ``m`` rows; what differs between its ``E`` exits is a list of arrays, one an exit.

    Args:
        name: of the stream.
        layers: the exit layers, ``E`` of them.
        num_layers: layers at full depth.
        sample: int ``[m]``, rising: whose row it is.
        step: int ``[m]``: of the answer; 0 outside the decoder.
        steps: at most so many in an answer: what a threshold that changes with the step counts by; 0 if not known.
        position: int ``[m]``: positions of the decoder, its prompt among them, once the row's step has run; else 0.
        scores: signal -> ``E`` float32 arrays ``[m]``.
        harm: ``E`` bool arrays ``[m]``: leaving there changes the token, or outside the decoder the output.
        score_at: metric -> float64 ``[E + 1, n]``: each sample's score when it always leaves there, and at full depth.
        samples: how many there are, ``n``.
    """

    name: str
    layers: tuple[int, ...]
    num_layers: int
    sample: np.ndarray
    step: np.ndarray
    steps: int
    position: np.ndarray
    scores: dict[str, list[np.ndarray]]
    harm: list[np.ndarray]
    score_at: dict[str, np.ndarray]
    samples: int

    @property
    def is_decoder(self) -> bool:
        """Whether rows are tokens."""
        return self.name == "decoder"

    @classmethod
    def of(cls, trace: Trace, name: str) -> StreamRows:
        """Return the rows of stream ``name``."""
        stream = trace.streams[name]
        if stream.agree is None:
            taken: tuple[np.ndarray, ...] = (np.arange(len(trace)),)
            safe, step, position = stream.same_at, np.zeros(len(trace), np.int64), np.zeros(len(trace), np.int64)
        else:
            taken = np.nonzero(np.arange(stream.agree.shape[1]) < trace.lengths[:, None])
            safe, step = stream.agree, taken[1]
            position = trace.prompts[taken[0]] + step + 1
        return cls(
            name,
            stream.layers,
            stream.num_layers,
            taken[0],
            step,
            int(trace.meta.get("decode", {}).get("max_new_tokens", 0)),
            position,
            {signal: _columns(scores[taken]) for signal, scores in stream.scores.items()},
            _columns(~safe[taken]),
            {metric: np.vstack([stream.score_at[metric].T, full]) for metric, full in trace.full_score.items()},
            len(trace),
        )


def _columns(values: np.ndarray) -> list[np.ndarray]:
    """Return the columns of ``[m, E]``, each contiguous."""
    return list(np.ascontiguousarray(values.T))
