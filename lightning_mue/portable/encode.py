"""The streams before the decoder as graphs: every sample leaves at its own layer; rows are compacted.

A stream's state is arrays by name, batch first: ``h_btd``, and where its layers or gates read them ``valid_bt``,
``mask`` and ``beside_bsd``: the fields of `StreamState`, in lower case as graphs name them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lightning_mue.inference.array_signals import flat_similarity, pool, sigmoid, similarity
from lightning_mue.inference.stopwatch import Stopwatch
from lightning_mue.policy import ExitRule
from lightning_mue.portable.files import GraphFiles

Array = np.ndarray
State = dict[str, Array]


@dataclass
class Encoded:
    """The decoder's memory and what the streams did.

    Args:
        memory_BSD: what the decoder reads.
        bias_BS: is added to its attention's scores; None: all is read.
        depths: stream name -> exit depth of each sample, int64 ``[B]``.
        layer_runs: stream name -> layer executions (calls).
    """

    memory_BSD: Array
    bias_BS: Array | None
    depths: dict[str, Array]
    layer_runs: dict[str, int]


def encode(
    files: GraphFiles, inputs: Mapping[str, Array], rules: Mapping[str, ExitRule], stopwatch: Stopwatch
) -> Encoded:
    """Run all streams before the decoder under their rules; a stream without a rule runs at full depth."""
    known, depths, layer_runs = dict(inputs), dict[str, Array](), dict[str, int]()
    for name, layers in files.facts["streams"]:
        with stopwatch.part(name):
            state = files.session(f"{name}/prologue").named(known)
            h_BTD, depths[name], layer_runs[name] = _climb(files, name, layers, state, rules.get(name))
            known[name] = _apply(files, f"{name}/epilogue", h_BTD)
    found = files.session("memory").named(known)
    bias_BS = np.ascontiguousarray(found["mask"][:, 0, 0]) if "mask" in found else None
    return Encoded(found["memory_BSD"], None if bias_BS is None or not bias_BS.any() else bias_BS, depths, layer_runs)


def _climb(files: GraphFiles, name: str, layers: int, state: State, rule: ExitRule | None) -> tuple[Array, Array, int]:
    """Return the exit branches' states ``[B, T, D]``, the depths ``[B]`` and the number of layer calls."""
    depth_B = np.full(len(state["h_btd"]), layers)
    row_R, result_BTD = np.arange(len(depth_B)), np.empty_like(state["h_btd"])
    for k in range(1, layers + 1):
        before_BTD = state["h_btd"]
        (state["h_btd"],) = files.session(f"{name}/{k}").named(state).values()
        threshold = None if rule is None else rule.reachable.get(k)
        if rule is None or threshold is None:
            continue
        leaves_R = _scores(files, rule.signal, f"{name}/{k}/gate", state, before_BTD) >= threshold
        if leaves_R.any():
            result_BTD[row_R[leaves_R]] = _apply(files, f"{name}/{k}/adapter", state["h_btd"][leaves_R])
            depth_B[row_R[leaves_R]] = k
            row_R, state = row_R[~leaves_R], {part: array[~leaves_R] for part, array in state.items()}
        if not len(row_R):
            return result_BTD, depth_B, k
    result_BTD[row_R] = state["h_btd"]
    return result_BTD, depth_B, layers


def _scores(files: GraphFiles, signal: str, gate: str, state: State, before_BTD: Array) -> Array:
    """Return the exit scores ``[R]``."""
    h_BTD, valid_BT = state["h_btd"], state.get("valid_bt")
    if signal == "similarity":
        return similarity(h_BTD, before_BTD, valid_BT)
    if signal == "flat_similarity":
        return flat_similarity(h_BTD, before_BTD)
    if signal == "gate":
        return sigmoid(files.session(gate)(pool(h_BTD, valid_BT))[0])
    return np.ones(len(h_BTD), np.float32)


def _apply(files: GraphFiles, name: str, h_BTD: Array) -> Array:
    """Run a graph on states; where there is none it changes nothing."""
    return files.session(name)(h_BTD)[0] if name in files else h_BTD
