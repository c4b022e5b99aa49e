"""The decoder of a bundle of graphs: its sessions, and what lies outside its layers."""

from __future__ import annotations

from functools import partial

import numpy as np

from lightning_mue.inference.outside import Outside
from lightning_mue.inference.session import DecoderSessions, Head, LayerSessions, Session
from lightning_mue.portable.files import GraphFiles

Array = np.ndarray


def decoder_sessions(files: GraphFiles) -> DecoderSessions:
    """Return all layers of the decoder and its head, running."""
    facts, session = files.facts["decoder"], files.session

    def head() -> Head:
        if "decoder/head" in files:
            return lambda h_RD: session("decoder/head")(h_RD)[0]
        return lambda h_RD: h_RD @ weight_VD.T + (0 if bias_V is None else bias_V)  # of beams alone

    def piece(k: int, name: str) -> Session | None:
        return session(at) if (at := f"decoder/{k}/{name}") in files else None

    windows = facts.get("windows", [None] * facts["layers"])  # older bundles are of no T5Gemma 2
    layers = [LayerSessions.of(partial(piece, k), window) for k, window in enumerate(windows, 1)]
    weight_VD = files.array("head_weight")
    bias_V, bias_HN = (
        files.array(name) if name in files.facts["arrays"] else None for name in ("head_bias", "distance_bias")
    )
    width = facts.get("head_dim", weight_VD.shape[1] // facts["heads"])  # older bundles are of no T5
    how = (facts["heads"], width, facts["max_positions"], files.facts["precision"], files.threads)
    return DecoderSessions(layers, *how, weight_VD, bias_V, head, files.graph("decoder/product"), bias_HN)


class GraphsOutside(Outside):
    """What of a decoder lies outside its layers and its head, as graphs.

    Args:
        files: of the bundle.
        sessions: the decoder's.
    """

    def __init__(self, files: GraphFiles, sessions: DecoderSessions) -> None:
        super().__init__(sessions, files.facts["decoder"]["shortlist"])
        self._files = files

    def embed(self, ids_Rm: Array, first: int) -> Array:
        """Return the states that enter layer 1."""
        given = {"ids": ids_Rm, "positions": np.arange(first, first + ids_Rm.shape[1])}  # a T5 reads no positions
        return self._files.session("decoder/embed").named(given)["h_RmD"]

    def branch(self, layer: int, h_RD: Array) -> Array:
        """Return what the head reads of an exit's states."""
        name = f"decoder/{layer}/branch"
        return self._files.session(name)(h_RD)[0] if name in self._files else h_RD

    def gate_session(self, layer: int) -> Session:
        """Return an exit's gate."""
        return self._files.session(f"decoder/{layer}/gate")
