"""TorchExecutor: the backbone's own layers with our K/V buffers; any backbone, device and dtype. The reference.

Shapes: ``B`` batch, ``R`` rows of one call, ``T`` positions, ``m`` new positions, ``D`` width, ``V`` vocabulary.
Buffers never move: rows are indexed (views while all rows go together), never shuffled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache, partial

import numpy as np
import torch
from torch import Tensor

from lightning_mue.backbones import Backbone
from lightning_mue.backbones.stream import TokenProcessor, causal_mask
from lightning_mue.exits import Exits
from lightning_mue.inference.sampling import Sampling
from lightning_mue.inference.schedule import Block, Place
from lightning_mue.inference.scored import Scored
from lightning_mue.inference.stopwatch import Stopwatch
from lightning_mue.signals import NEEDS_LOGITS, OF_LOGITS, flat_similarity, similarity

Index = slice | Tensor
Position = int | Tensor


class TorchExecutor:
    """One batch's decode: states and K/V of every position reached.

    Args:
        backbone: the model's streams.
        exits: its exits, or None.
        memory_BSD: what the decoder's cross-attention reads.
        memory_mask: additive ``[B, 1, 1, S]`` or None.
        positions: at most: of the decoder prompt and of the answer.
        processors: applied to logits before the arg-max and before logit signals.
        stopwatch: where the time of each part goes.
        beams: so many rows, one after the other, read the same memory.
        closed: the only tokens that ``processors`` ever leave, where they are known; None: any.
        sampling: how tokens are drawn; None: the best are taken.
    """

    def __init__(
        self,
        backbone: Backbone,
        exits: Exits | None,
        memory_BSD: Tensor,
        memory_mask: Tensor | None,
        positions: int,
        processors: Sequence[TokenProcessor],
        stopwatch: Stopwatch,
        beams: int = 1,
        closed: Sequence[int] | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        decoder = self._decoder = backbone.decoder
        if positions > decoder.max_positions:
            raise ValueError(
                f"`max_new_tokens` (and the decoder prompt) must not pass the decoder's {decoder.max_positions} "
                f"positions, got {positions}"
            )
        self._exits, self._processors, self._watch = exits, processors, stopwatch
        self._memory, self._memory_mask = memory_BSD, memory_mask
        bias_HN = decoder.distance_bias()
        mask = partial(causal_mask, dtype=memory_BSD.dtype, device=memory_BSD.device, bias_HN=bias_HN)
        self._mask = lru_cache(8)(mask)  # layers, one after the other, ask for the same
        self.num_layers, self.base_layers = decoder.num_layers, decoder.first_exit - 1
        self.batch, self._beams = memory_BSD.shape[0] * beams, beams
        self._owner_RT: Tensor | None = None
        self._closed = None if closed is None else torch.tensor(closed, device=memory_BSD.device)
        new = memory_BSD.new_empty
        kv_shape = (decoder.num_layers + 1, self.batch, decoder.num_kv_heads, positions, decoder.head_dim)
        self._keys, self._values = new(kv_shape), new(kv_shape)
        self.states = new(decoder.num_layers + 1, self.batch, positions, decoder.width)
        self.ids = torch.zeros(self.batch, positions + 1, dtype=torch.long, device=memory_BSD.device)
        self._memory_kv: list[tuple[Tensor, Tensor] | None] = [None] * (decoder.num_layers + 1)
        self._projected: list[set[int]] = [set() for _ in range(decoder.num_layers + 1)]
        self._scored, self._sampling = Scored(), sampling

    def share(self, owner_RT: np.ndarray) -> None:
        """From now on position ``t`` of row ``r`` is in row ``owner_RT[r, t]``; the table may change."""
        self._owner_RT = torch.from_numpy(owner_RT)

    def sequences(self, length: int) -> Tensor:
        """Return the first tokens of all rows, ``[B, length]``."""
        return self.ids[self._where(slice(0, self.batch), 0, length)]

    def embed(self, rows: Sequence[int], first: int, tokens: Sequence[Sequence[int]]) -> None:
        """Write the states that enter layer 1."""
        with self._watch.part("embed"):
            index = self._index(rows)
            new_Rm = torch.tensor(tokens, device=self.ids.device)
            block = slice(first, first + new_Rm.shape[1])
            self.ids[index, block] = new_Rm
            self.states[0, index, block] = self._decoder.embed(new_Rm, first)
            self._scored.clear()

    def run_layer(self, layer: int, pending: Sequence[Block]) -> None:
        """Push blocks of positions through one layer; its memory K/V are projected when rows first reach it."""
        for first, last, rows in pending:
            self._run_block(layer, rows, first, last)

    def _run_block(self, layer: int, rows: Sequence[int], first: int, last: int) -> None:
        self._project_memory(layer, rows)
        with self._watch.part("layers"):
            new = self._where(self._index(rows), first, last)
            h_RmD = self.states[layer - 1][new]
            memory_mask = None if self._memory_mask is None else self._memory_mask[self._samples(rows)]
            kv = _RowsKV(self, layer, rows, first, last)
            mask = self._mask(first, last, window=self._decoder.window(layer))
            left_RmD = self._decoder.cached_layer(layer, h_RmD, kv, mask, memory_mask)
            self.states[layer][new] = left_RmD.to(self.states.dtype)  # under autocast layers give less

    def fill(self, mode: str, layer: int, rows: Sequence[int], first: int, last: int) -> None:
        """Pass states up one layer and project them there (``propagate``), or copy the K/V of the layer below."""
        with self._watch.part("layers"):
            index, block = self._index(rows), slice(first, last)
            self.states[layer, index, block] = self.states[layer - 1, index, block]
            if mode == "copy":
                self._keys[layer, index, :, block] = self._keys[layer - 1, index, :, block]
                self._values[layer, index, :, block] = self._values[layer - 1, index, :, block]
            else:
                key, value = self._decoder.self_kv(layer, self.states[layer - 1, index, block], first)
                self._keys[layer, index, :, block], self._values[layer, index, :, block] = key, value

    def score(self, signal: str, layer: int, places: Sequence[Place]) -> list[float]:
        """Return exit scores as numbers: the one place where a decode waits for the device at every exit."""
        if signal == "static":
            return [1.0] * len(places)
        with self._watch.part("signals"):
            index, position = self._at(places)
            logits_RV = None
            if signal in NEEDS_LOGITS:
                logits_RV = self.exit_logits(layer, index, position)
                self._scored.note(layer, places, self._drawn(logits_RV, places))
            if signal == "patience":
                return self._scored.patience(layer)
            return self.scores(signal, layer, index, position, logits_RV).tolist()

    def scores(self, signal: str, layer: int, index: Index, position: Position, logits_RV: Tensor | None) -> Tensor:
        """Return exit scores ``[R]`` as a tensor; ``logits_RV`` where the signal needs logits."""
        h_RD = self.states[layer, index, position]
        if signal == "similarity":
            return similarity(h_RD[:, None], self.states[layer - 1, index, position][:, None])
        if signal == "flat_similarity":
            return flat_similarity(h_RD, self.states[layer - 1, index, position])
        if signal == "gate":
            assert self._exits is not None
            return self._exits.gate_logit("decoder", layer, h_RD, rows=self._shortlist_head).float().sigmoid()
        assert logits_RV is not None
        return OF_LOGITS[signal](logits_RV)

    @cached_property
    def _shortlist_head(self) -> Callable[[Tensor], Tensor] | None:
        assert self._exits is not None
        return self._exits.shortlist_head(self._decoder)

    def exit_logits(self, layer: int, index: Index, position: Position) -> Tensor:
        """Return the processed logits ``[R, V]`` of an exit: adapter, shared norm, shared head."""
        h_RD = self._branch(layer, index, position)
        return self._process(self._head(h_RD), index, position)

    def _head(self, h_RD: Tensor) -> Tensor:
        """Return the logits of exit branches, ``[R, V]``; of a few tokens only their own rows are scored."""
        if self._closed is None:
            return self._decoder.head(self._decoder.norm(h_RD))
        logits_RV = h_RD.new_full((len(h_RD), self._decoder.vocab_size), -torch.inf)
        logits_RV[:, self._closed] = self._closed_head(self._decoder.norm(h_RD))
        return logits_RV

    @cached_property
    def _closed_head(self) -> Callable[[Tensor], Tensor]:
        assert self._closed is not None
        return self._decoder.head_rows(self._closed)

    def choose(self, exits: Mapping[int, Sequence[Place]]) -> dict[Place, int]:
        """The best tokens, or those drawn; exits whose logits the signal computed already cost nothing more."""
        with self._watch.part("head"):
            chosen, fresh = self._scored.split(exits)
            if fresh:
                places = [place for group in fresh.values() for place in group]
                branches = [self._branch(k, *self._at(group)) for k, group in fresh.items()]
                h_RD = torch.cat(branches) if len(branches) > 1 else branches[0]
                chosen |= dict(zip(places, self._best(h_RD, places), strict=True))
            return chosen

    def log_probs(self, exits: Mapping[int, Sequence[Place]]) -> np.ndarray:
        """Return the processed log probabilities ``[R, V]`` of places, given by exit layer."""
        with self._watch.part("head"):
            places = [place for group in exits.values() for place in group]
            log_probs_RV = self.logits(exits).float().log_softmax(-1)  # over all tokens
            return self._process(log_probs_RV, *self._at(places)).cpu().numpy()

    def logits(self, exits: Mapping[int, Sequence[Place]]) -> Tensor:
        """Return the logits ``[R, V]`` of places, given by exit layer, before any processor."""
        h_RD = torch.cat([self._branch(k, *self._at(group)) for k, group in exits.items()])
        return self._decoder.head(self._decoder.norm(h_RD))

    def _best(self, h_RD: Tensor, places: Sequence[Place]) -> list[int]:
        """Return the token that each exit branch chooses."""
        logits_RV = self._process(self._head(h_RD), *self._at(places))
        tokens: list[int] = self._drawn(logits_RV, places).argmax(-1).tolist()
        return tokens

    def _drawn(self, logits_RV: Tensor, places: Sequence[Place]) -> Tensor | np.ndarray:
        """Return what to take the arg-max of: processed logits, or their sum with noise, on the host."""
        if self._sampling is None:
            return logits_RV
        rows, positions = zip(*places, strict=True)
        noise_RV = self._sampling.noise(rows, positions, logits_RV.shape[1])
        return self._sampling.perturbed(logits_RV.float().cpu().numpy(), noise_RV)

    def _branch(self, layer: int, index: Index, position: Position) -> Tensor:
        h_RD = self.states[layer, index, position]
        return h_RD if self._exits is None else self._exits.adapt("decoder", layer, h_RD)

    def _process(self, logits_RV: Tensor, index: Index, position: Position) -> Tensor:
        if isinstance(position, int):
            for processor in self._processors:
                logits_RV = processor(self.ids[self._where(index, 0, position + 1)], logits_RV, self._rows(index))
            return logits_RV
        processed_RV, row_R = torch.empty_like(logits_RV), torch.as_tensor(self._rows(index), device=self.ids.device)
        for at in position.unique().tolist() if self._processors else ():
            here = position == at
            processed_RV[here] = self._process(logits_RV[here], row_R[here], at)
        return processed_RV if self._processors else logits_RV

    def _rows(self, index: Index) -> Sequence[int]:
        return range(self.batch)[index] if isinstance(index, slice) else index.tolist()

    def _at(self, places: Sequence[Place]) -> tuple[Index, Position]:
        """Return how to index rows and positions."""
        rows, positions = zip(*places, strict=True)
        if len({*positions}) == 1:
            return self._index(rows), positions[0]
        return torch.tensor(rows, device=self.ids.device), torch.tensor(positions, device=self.ids.device)

    def _index(self, rows: Sequence[int]) -> Index:
        """Return a slice where rows are consecutive (reads and writes are then views), else a tensor."""
        if list(rows) == list(range(rows[0], rows[-1] + 1)):
            return slice(rows[0], rows[-1] + 1)
        return torch.tensor(rows, device=self.ids.device)

    def _where(self, index: Index, first: int, last: int) -> tuple[Index, slice | Tensor]:
        """Return how positions of rows are indexed in buffers ``[B, T, ...]``, wherever they lie."""
        if self._owner_RT is None:
            return index, slice(first, last)
        where = index.cpu() if isinstance(index, Tensor) else index  # the table lies where the schedule writes it
        owner_Rm = self._owner_RT[where, first:last].to(self.ids.device)
        return owner_Rm, torch.arange(first, last, device=self.ids.device)

    def _samples(self, rows: Sequence[int]) -> Index:
        """Return how the samples of rows are indexed; a single one of several beams once."""
        samples = [row // self._beams for row in rows]
        return self._index(samples[:1] if self._beams > 1 and len({*samples}) == 1 else samples)

    def _project_memory(self, layer: int, rows: Sequence[int]) -> None:
        missing = [s for s in dict.fromkeys(r // self._beams for r in rows) if s not in self._projected[layer]]
        if not missing:
            return
        with self._watch.part("memory"):
            self.project_memory(layer, missing)
            self._projected[layer].update(missing)

    def project_memory(self, layer: int, samples: Sequence[int]) -> None:
        """Write K and V of samples where they stay; nothing for a layer that reads none."""
        if not self._decoder.reads_memory(layer):
            return
        index, stored = self._index(samples), self._memory_kv[layer]
        key, value = self._decoder.memory_kv(layer, self._memory[index])
        if len(samples) == len(self._memory):
            self._memory_kv[layer] = (key, value)
            return
        if stored is None:
            shape = (len(self._memory), *key.shape[1:])
            stored = self._memory_kv[layer] = (key.new_empty(shape), value.new_empty(shape))
        stored[0][index], stored[1][index] = key, value


class _RowsKV:
    """One layer's K/V for the rows and positions of one call (a ``LayerKV``)."""

    def __init__(self, owner: TorchExecutor, layer: int, rows: Sequence[int], first: int, last: int) -> None:
        self.first, self._count, index, self._samples = first, len(rows), owner._index(rows), owner._samples(rows)
        self._new, self._seen = owner._where(index, first, last), owner._where(index, 0, last)
        self._kv, self._memory = (owner._keys[layer], owner._values[layer]), owner._memory_kv[layer]

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        for buffer_BHTd, new_RHmd in zip(self._kv, (key, value), strict=True):
            buffer_BHTd.transpose(1, 2)[self._new] = new_RHmd.transpose(1, 2).to(buffer_BHTd.dtype)
        keys, values = (buffer_BHTd.transpose(1, 2)[self._seen].transpose(1, 2) for buffer_BHTd in self._kv)
        return keys, values

    def memory(self) -> tuple[Tensor, Tensor]:
        assert self._memory is not None
        key, value = (kv[self._samples].expand(self._count, -1, -1, -1) for kv in self._memory)
        return key, value
