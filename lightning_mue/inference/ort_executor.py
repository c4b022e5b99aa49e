"""OrtExecutor: the decoder through ONNX Runtime, for CPUs. Same schedule and signals as TorchExecutor; arrays alone.

All pending (row, position) pairs of a layer go through its matrices in one call, wherever each row's frontier lies.
Attention alone looks at rows one by one, on K/V that never move.

Shapes: ``B`` batch, ``R`` rows of one call, ``N`` pairs of a row and a position, ``m`` new positions, ``S`` memory
tokens, ``H`` heads of ``d``, ``D`` width, ``V`` vocabulary. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lightning_mue.inference.array_signals import NEEDS_LOGITS, OF_LOGITS, flat_similarity, log_softmax, similarity
from lightning_mue.inference.bfloat16 import to_bfloat16
from lightning_mue.inference.outside import Outside
from lightning_mue.inference.pairs import Keys, attend_both, pairs, runs
from lightning_mue.inference.ragged import attend
from lightning_mue.inference.sampling import Sampling
from lightning_mue.inference.schedule import Block, Place
from lightning_mue.inference.scored import Scored
from lightning_mue.inference.session import DecoderSessions
from lightning_mue.inference.stopwatch import Stopwatch

Array = np.ndarray
Processor = Callable[[Array, Array, Sequence[int]], Array]
"""(ids so far ``[R, t]``, logits ``[R, V]``, the batch's row of each) -> logits."""


_TOKENS = 512
"""Of the memory, projected at once: what lies between then stays in the cache."""


class OrtExecutor:
    """One batch's decode: states and K/V of every position reached.

    Args:
        sessions: the decoder's.
        outside: what lies outside its layers.
        memory_BSD: what its cross-attention reads.
        bias_BS: is added to that attention's scores; None: all is read.
        positions: at most: of the decoder prompt and of the answer.
        processors: applied to logits before the arg-max and before logit signals.
        stopwatch: where the time of each part goes.
        beams: so many rows, one after the other, read the same memory.
        closed: the only tokens that ``processors`` ever leave, where they are known; None: any.
        sampling: how tokens are drawn; None: the best are taken.
    """

    def __init__(
        self,
        sessions: DecoderSessions,
        outside: Outside,
        memory_BSD: Array,
        bias_BS: Array | None,
        positions: int,
        processors: Sequence[Processor],
        stopwatch: Stopwatch,
        beams: int = 1,
        closed: Sequence[int] | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        if positions > sessions.max_positions:
            raise ValueError(
                f"`max_new_tokens` (and the decoder prompt) must not pass the decoder's {sessions.max_positions} "
                f"positions, got {positions}"
            )
        self._sessions, self._outside, self._processors, self._watch = sessions, outside, processors, stopwatch
        self._memory, self._bias_BS = memory_BSD, bias_BS
        self._closed_head = None if closed is None else sessions.closed_head(closed)
        self.num_layers, width = len(sessions.layers), sessions.weight_VD.shape[1]
        self.base_layers = sum(of_layer.memory is None for of_layer in sessions.layers)
        self.batch, self._beams = len(memory_BSD) * beams, beams
        self._owner_RT: Array | None = None
        layers, self._heads = self.num_layers + 1, (-1, sessions.heads, sessions.head_dim)
        kv_shape = (layers, self.batch, sessions.heads, positions, sessions.head_dim)
        self._keys, self._values = self._empty(kv_shape), self._empty(kv_shape)
        self.states = self._empty((layers, self.batch, positions, width))
        self.ids = np.zeros((self.batch, positions + 1), np.int64)
        self._memory_kv: dict[int, Array] = {}
        self._rounded = sessions.precision != "float32"
        self._projected: list[set[int]] = [set() for _ in range(layers)]
        self._scored, self._sampling = Scored(), sampling
        self._back_HT = {window: sessions.back(positions, window) for window in {of.window for of in sessions.layers}}

    def share(self, owner_RT: Array) -> None:
        """From now on position ``t`` of row ``r`` is in row ``owner_RT[r, t]``; the table may change."""
        self._owner_RT = owner_RT

    def embed(self, rows: Sequence[int], first: int, tokens: Sequence[Sequence[int]]) -> None:
        """Write the states that enter layer 1."""
        with self._watch.part("embed"):
            ids_Rm = np.array(tokens)
            places = self._where(np.array(rows)[:, None], np.arange(first, first + ids_Rm.shape[1]))
            self.ids[places] = ids_Rm
            self.states[0][places] = self._outside.embed(ids_Rm, first)
            self._scored.clear()

    def run_layer(self, layer: int, pending: Sequence[Block]) -> None:
        """Push all pending positions through one layer, together."""
        sessions, threads = self._sessions.layers[layer - 1], self._sessions.threads
        for _, _, rows in pending:
            self._project_memory(layer, rows)
        with self._watch.part("layers"):
            rows_N, positions_N = pairs(pending)
            places = self._where(rows_N, positions_N)
            h_ND = self.states[layer - 1][places]
            query_ND, key_ND, value_ND = sessions.project(h_ND, positions_N)
            self._keep(layer, places, key_ND, value_ND)
            queries = query_ND.shape[1] // key_ND.shape[1]  # of a pair, that share its keys: as good as so many pairs
            keys, values, at_N = self._seen(layer, rows_N, int(positions_N.max()) + 1)
            own: Keys = keys, values, at_N.repeat(queries), (positions_N + 1).repeat(queries), None
            back_HT = self._back_HT[sessions.window]
            back_HT = None if back_HT is None else back_HT[:, : keys.shape[2]]
            memory = None if sessions.memory is None else self._memory_of(layer, rows_N.repeat(queries))
            if sessions.between is None and memory is not None:
                read = attend_both(query_ND.reshape(self._heads), own, memory, threads, back_HT=back_HT)
            else:
                read = attend(query_ND.reshape(self._heads), *own, threads=threads, back_HT=back_HT)
            if sessions.between is not None and memory is not None:
                h_ND, query_ND = sessions.between(h_ND, read.reshape(query_ND.shape))
                read = attend(query_ND.reshape(self._heads), *memory, threads=threads)
            (h_ND,) = sessions.after(h_ND, read.reshape(query_ND.shape))
            self.states[layer][places] = h_ND

    def fill(self, mode: str, layer: int, rows: Sequence[int], first: int, last: int) -> None:
        """Pass states up one layer and project them there (``propagate``), or copy the K/V of the layer below."""
        with self._watch.part("layers"):
            place_row_N, place_N = places = self._where(*(at := pairs([(first, last, rows)])))
            h_ND = self.states[layer][places] = self.states[layer - 1][places]
            if mode == "copy":
                key, value = (kv[layer - 1][place_row_N, :, place_N] for kv in (self._keys, self._values))
            else:
                _, key, value = self._sessions.layers[layer - 1].project(h_ND, at[1])
            self._keep(layer, places, key, value)

    def score(self, signal: str, layer: int, places: Sequence[Place]) -> list[float]:
        """Return exit scores as numbers."""
        if signal == "static":
            return [1.0] * len(places)
        with self._watch.part("signals"):
            row_R, position_R = np.array(places).T
            logits_RV = None
            if signal in NEEDS_LOGITS:
                logits_RV = self.exit_logits(layer, row_R, position_R)
                self._scored.note(layer, places, self._drawn(logits_RV, row_R, position_R))
            if signal == "patience":
                return self._scored.patience(layer)
            found: list[float] = self.scores(signal, layer, row_R, position_R, logits_RV).tolist()
            return found

    def scores(self, signal: str, layer: int, row_R: Any, position_R: Any, logits_RV: Array | None) -> Array:
        """Return exit scores ``[R]`` as an array; rows and positions as of ``exit_logits``, whose logits some need."""
        places = self._where(np.asarray(row_R), np.asarray(position_R))
        h_RD = self.states[layer][places]
        if signal == "similarity":
            return similarity(h_RD[:, None], self.states[layer - 1][places][:, None])
        if signal == "flat_similarity":
            return flat_similarity(h_RD, self.states[layer - 1][places])
        if signal == "gate":
            return self._outside.gate(layer, h_RD)
        assert logits_RV is not None
        return OF_LOGITS[signal](logits_RV)

    def exit_logits(self, layer: int, row_R: Any, position_R: Any) -> Array:
        """Return the processed logits ``[R, V]`` of an exit; one position may stand for all rows."""
        row_R, position_R = np.broadcast_arrays(np.asarray(row_R), np.asarray(position_R))
        head = self._closed_head or self._sessions.head
        logits_RV = head(self._branch(layer, row_R, position_R))
        return self._process(logits_RV, row_R, position_R)

    def choose(self, exits: Mapping[int, Sequence[Place]]) -> dict[Place, int]:
        """The best tokens, or those drawn; exits whose logits the signal computed already cost nothing more."""
        with self._watch.part("head"):
            chosen, fresh = self._scored.split(exits)
            if fresh:
                of_exits = {k: np.array(places).T for k, places in fresh.items()}
                h_RD = np.concatenate([self._branch(k, *at) for k, at in of_exits.items()])
                tokens = self.best(h_RD, *np.concatenate([*of_exits.values()], 1)).tolist()
                chosen |= dict(zip((place for places in fresh.values() for place in places), tokens, strict=True))
            return chosen

    def log_probs(self, exits: Mapping[int, Sequence[Place]]) -> Array:
        """Return the processed log probabilities ``[R, V]`` of places, given by exit layer."""
        with self._watch.part("head"):
            of_exits = {k: np.array(places).T for k, places in exits.items()}
            logits_RV = self._sessions.head(np.concatenate([self._branch(k, *at) for k, at in of_exits.items()]))
            return self._process(log_softmax(logits_RV), *np.concatenate([*of_exits.values()], 1))

    def best(self, h_RD: Array, row_R: Array, position_R: Array) -> Array:
        """Return the token ``[R]`` that each exit branch chooses: of a few, or of all without all their logits.

        Noise is added to each score by itself, so what is drawn needs no more of the head than the best does; only
        ``top_k`` and ``top_p`` look at all logits.
        """
        sampling, head = self._sampling, self._closed_head
        if head is None and sampling is not None and not sampling.is_by_token:
            head = self._sessions.head
        if head is not None:
            return self._drawn(self._process(head(h_RD), row_R, position_R), row_R, position_R).argmax(-1)

        def process(asked_R: Array, scores_RV: Array) -> Array:
            return self._process(scores_RV, row_R[asked_R], position_R[asked_R])

        if sampling is None:
            return self._sessions.greedy_head.argmax(h_RD, process if self._processors else None)
        noise_RV = sampling.noise(row_R, position_R, len(self._sessions.weight_VD))

        def drawn(asked_R: Array, scores_RV: Array) -> Array:
            return sampling.perturbed(process(asked_R, scores_RV), noise_RV[asked_R])

        return self._sessions.greedy_head.argmax(h_RD, drawn)

    def _drawn(self, logits_RV: Array, row_R: Array, position_R: Array) -> Array:
        """Return what to take the arg-max of: processed logits, or their sum with noise."""
        if self._sampling is None:
            return logits_RV
        noise_RV = self._sampling.noise(row_R, position_R, logits_RV.shape[1])
        return self._sampling.perturbed(logits_RV, noise_RV)

    def _branch(self, layer: int, row_R: Array, position_R: Array) -> Array:
        return self._outside.branch(layer, self.states[layer][self._where(row_R, position_R)])

    def _process(self, logits_RV: Array, row_R: Array, position_R: Array) -> Array:
        if not self._processors:
            return logits_RV
        processed_RV = np.empty_like(logits_RV)
        for position in np.unique(position_R):
            here = np.flatnonzero(position_R == position)
            found_RV = logits_RV[here]
            for processor in self._processors:
                ids_Rt = self.ids[self._where(row_R[here, None], np.arange(position + 1))]
                found_RV = processor(ids_Rt, found_RV, row_R[here].tolist())
            processed_RV[here] = found_RV
        return processed_RV

    def _empty(self, shape: tuple[int, ...], kind: type = np.float32) -> Array:
        return self._sessions.buffers.lend(self, shape, kind)

    def _where(self, row: Array, position: Array) -> tuple[Array, Array]:
        """Return how positions of rows are indexed in buffers, wherever they lie."""
        return row if self._owner_RT is None else self._owner_RT[row, position], position

    def _keep(self, layer: int, places: tuple[Array, Array], key: Array, value: Array) -> None:
        row_N, position_N = places
        self._keys[layer][row_N, :, position_N] = key.reshape(self._heads)
        self._values[layer][row_N, :, position_N] = value.reshape(self._heads)

    def _seen(self, layer: int, rows_N: Array, length: int) -> tuple[Array, Array, Array]:
        """Return K and V, and the row in them of each pair; of beams, whose positions lie in many rows, copies."""
        if self._owner_RT is None:
            return self._keys[layer], self._values[layer], rows_N
        rows_R, at_N = np.unique(rows_N, return_inverse=True)
        row_RT, position_T = self._where(rows_R[:, None], np.arange(length))
        kv_RTHd = (kv[layer].swapaxes(1, 2)[row_RT, position_T] for kv in (self._keys, self._values))
        keys_RHTd, values_RHTd = (np.ascontiguousarray(kv.swapaxes(1, 2)) for kv in kv_RTHd)
        return keys_RHTd, values_RHTd, at_N

    def _memory_of(self, layer: int, rows_N: Array) -> Keys:
        """Return what `attend` takes of the memory."""
        key_BHSd, value_BHSd = self._memory_kv[layer]
        lengths_N = np.full_like(rows_N, key_BHSd.shape[2])
        return key_BHSd, value_BHSd, rows_N // self._beams, lengths_N, self._bias_BS

    def _project_memory(self, layer: int, rows: Sequence[int]) -> None:
        missing = [s for s in dict.fromkeys(r // self._beams for r in rows) if s not in self._projected[layer]]
        if not missing:
            return
        with self._watch.part("memory"):
            self.project_memory(layer, missing)
            self._projected[layer].update(missing)

    def project_memory(self, layer: int, samples: Sequence[int]) -> None:
        """Write K and V of samples where they stay; nothing for a layer that reads none.

        Beside matrices of 8 bits they are kept in 16, for reading them is most of the work.
        """
        project = self._sessions.layers[layer - 1].memory
        if project is None:
            return
        rounded, (_, heads, d), (batch, length, _) = self._rounded, self._heads, self._memory.shape
        if layer not in self._memory_kv:
            kind = np.uint16 if rounded else np.float32
            self._memory_kv[layer] = self._empty((2, batch, heads, length, d), kind)
        for first, last in runs(samples, max(1, _TOKENS // length)):
            stored_2RHSd = self._memory_kv[layer][:, first:last]
            found_2RHSd = np.empty(stored_2RHSd.shape, np.float32) if rounded else stored_2RHSd
            project.into([self._memory[first:last]], [*found_2RHSd])
            if rounded:
                to_bfloat16(found_2RHSd, out=stored_2RHSd)
