"""The supervised pass: teacher-forced, every decoder exit, streams left at a given depth. Pure tensor functions.

Shapes: ``B`` batch, ``T`` target positions, ``D`` width, ``N`` target tokens that count (padding left out).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from lightning_mue.backbones import Backbone, StreamState
from lightning_mue.backbones.stream import Inputs, causal_mask
from lightning_mue.exits import Exits
from lightning_mue.prompt import IGNORE, prompt_lengths
from lightning_mue.training.losses import divergence


@dataclass
class StreamStates:
    """What the gates of a stream learn from: detached states at each exit that was passed."""

    at_exit: dict[int, Tensor]
    valid_BT: Tensor | None


@dataclass
class Teacher:
    """What earlier exits learn to say: the last exit's log-probabilities ``[N, V]`` at a temperature, no gradient."""

    log_p_NV: Tensor
    temperature: float


@dataclass
class ExitResult:
    """One decoder exit on one batch: mean cross-entropy, the tokens it would choose ``[N]``, KL from the teacher."""

    loss: Tensor
    tokens_N: Tensor
    divergence: Tensor | None


@dataclass
class Supervised:
    """What a pass found.

    Args:
        results: decoder layer -> result, in order; the last one is full depth.
        states: the decoder's after every layer, from the embedding on.
        streams: each other stream's at the exits it passed.
        counts_BT: True at target tokens that count.
        left: the states with which each other stream was left, adapters applied.
    """

    results: dict[int, ExitResult]
    states: list[Tensor]
    streams: dict[str, StreamStates]
    counts_BT: Tensor
    left: dict[str, StreamState]

    @property
    def last(self) -> ExitResult:
        """Full depth."""
        return self.results[max(self.results)]

    def agrees(self, k: int) -> Tensor:
        """Return ``[N]``: the exit after decoder layer ``k`` chooses the token that the last layer chooses."""
        return self.results[k].tokens_N == self.last.tokens_N


def decoder_exits(backbone: Backbone, exits: Exits) -> tuple[int, ...]:
    """Return the decoder's exit layers, the last layer included."""
    return (*exits.layers.get("decoder", ()), backbone.decoder.num_layers)


def supervise(
    backbone: Backbone,
    exits: Exits,
    inputs: Inputs,
    labels_BT: Tensor,
    depths: Mapping[str, int],
    at: Sequence[int] | None = None,
    distill_temperature: float | None = None,
) -> Supervised:
    """Teacher-force the decoder's exits, the streams before it left at ``depths``.

    Args:
        backbone: the model's streams.
        exits: its exits.
        inputs: the backbone's own.
        labels_BT: target tokens, the answer's alone; -100 where none counts.
        depths: stream name -> depth; full depth where not named.
        at: decoder layers whose results are wanted; all exits and the last layer if not given.
        distill_temperature: compare the exits with the last one at this temperature; None does not.
    """
    ids_BT, labels_BT = teacher_forced(backbone, inputs, labels_BT)
    memory_BSD, streams, left = encode(backbone, exits, inputs, depths)
    states = decoder_states(backbone, memory_BSD, backbone.memory_mask(inputs), ids_BT)
    teacher, last = None, backbone.decoder.num_layers
    if distill_temperature is not None:
        logits_NV = exit_logits(backbone, exits, last, states[last][labels_BT != IGNORE]).detach()
        log_p_NV = (logits_NV.float() / distill_temperature).log_softmax(-1)
        teacher = Teacher(log_p_NV, distill_temperature)
    results = {
        k: exit_result(backbone, exits, k, states[k], labels_BT, teacher if k < last else None)
        for k in at or decoder_exits(backbone, exits)
    }
    return Supervised(results, states, streams, labels_BT != IGNORE, left)


def run_streams(
    backbone: Backbone,
    exits: Exits,
    inputs: Inputs,
    ids_BT: Tensor,
    depths: Mapping[str, int],
    depth_BT: Tensor | None = None,
) -> tuple[list[Tensor], dict[str, StreamStates]]:
    """Run everything but the heads; return the decoder's states after every layer and the other streams' at exits."""
    memory_BSD, streams, _ = encode(backbone, exits, inputs, depths)
    return decoder_states(backbone, memory_BSD, backbone.memory_mask(inputs), ids_BT, depth_BT), streams


def encode(
    backbone: Backbone, exits: Exits, inputs: Inputs, depths: Mapping[str, int]
) -> tuple[Tensor, dict[str, StreamStates], dict[str, StreamState]]:
    """Run the streams before the decoder, each left after ``depths[name]`` layers (full depth where not named).

    Returns:
        The decoder's memory ``[B, S, D]``, each stream's states at the exits passed, and those with which it was left.
    """
    done: dict[str, Tensor] = {}
    states: dict[str, StreamStates] = {}
    left: dict[str, StreamState] = {}
    for stream in backbone.encoders:
        depth = depths.get(stream.name, stream.num_layers)
        state = stream.prologue(inputs, done)
        states[stream.name] = StreamStates({}, state.valid_BT)
        for k in range(1, depth + 1):
            state.h_BTD = stream.layer(k, state)
            if k in exits.layers.get(stream.name, ()):
                states[stream.name].at_exit[k] = state.h_BTD.detach()
        left[stream.name] = state.at(exits.adapt(stream.name, depth, state.h_BTD))
        done[stream.name] = stream.epilogue(left[stream.name])
    return backbone.memory(done), states, left


def decoder_states(
    backbone: Backbone, memory_BSD: Tensor, memory_mask: Tensor | None, ids_BT: Tensor, depth_BT: Tensor | None = None
) -> list[Tensor]:
    """Run the decoder over whole target sequences; return the states after layers 0 (embedding) to the last.

    Args:
        backbone: the model's streams.
        memory_BSD: what the decoder's cross-attention reads.
        memory_mask: additive, or None.
        ids_BT: input tokens.
        depth_BT: the layer after which each position is left; above it the position's state stays as it is, and deeper
            layers project its K/V from that (CALM, section 3.1). None leaves none.
    """
    decoder = backbone.decoder
    states = [decoder.embed(ids_BT, 0)]
    seen = (0, ids_BT.shape[1], states[0].dtype, ids_BT.device, decoder.distance_bias())
    masks = {window: causal_mask(*seen, window) for window in {*map(decoder.window, range(1, decoder.num_layers + 1))}}
    for k in range(1, decoder.num_layers + 1):
        mask = masks[decoder.window(k)]
        h_BTD = decoder.layer(k, states[-1], memory_BSD, mask, memory_mask)
        states.append(h_BTD if depth_BT is None else torch.where((depth_BT >= k)[..., None], h_BTD, states[-1]))
    return states


def teacher_forced(backbone: Backbone, inputs: Inputs, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Return the decoder's input tokens and, at the same positions, the target tokens: -100 where none counts.

    Where there is a ``decoder_prompt``, each row's answer follows its prompt, whose tokens are no targets.
    """
    settings, whole_BT = backbone.decode_settings(None), labels_BT
    if (prompt_BP := inputs.get("decoder_prompt")) is not None:
        rows = [torch.cat([prompt[prompt >= 0], row]) for prompt, row in zip(prompt_BP, labels_BT, strict=True)]
        whole_BT = pad_sequence(rows, batch_first=True, padding_value=IGNORE)
        at_BT = torch.arange(whole_BT.shape[1], device=whole_BT.device)
        labels_BT = whole_BT.masked_fill(at_BT < prompt_lengths(prompt_BP)[:, None], IGNORE)
    return shift_right(whole_BT, settings.start_id, settings.pad_id), labels_BT


def shift_right(labels_BT: Tensor, start_id: int, pad_id: int) -> Tensor:
    """Return the decoder's inputs for given labels."""
    ids_BT = labels_BT.roll(1, dims=1)
    ids_BT[:, 0] = start_id
    return ids_BT.masked_fill(ids_BT == IGNORE, pad_id)


def exit_logits(backbone: Backbone, exits: Exits, k: int, h: Tensor) -> Tensor:
    """Return the vocabulary logits ``[..., V]`` of the decoder exit after layer ``k``: adapter, norm, head."""
    return backbone.decoder.head(backbone.decoder.norm(exits.adapt("decoder", k, h)))


def exit_result(
    backbone: Backbone, exits: Exits, k: int, h_BTD: Tensor, labels_BT: Tensor, teacher: Teacher | None = None
) -> ExitResult:
    """Return the loss and choices of the decoder exit after layer ``k``.

    The logits are recomputed in the backward pass, so that only one exit's logits (and the teacher's) are ever in
    memory.
    """

    def from_states(h_ND: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        logits_NV = exit_logits(backbone, exits, k, h_ND)
        apart = None if teacher is None else divergence(logits_NV, teacher.log_p_NV, teacher.temperature)
        return cross_entropy(logits_NV.float(), labels_N), logits_NV.detach().argmax(-1), apart

    counts = labels_BT != IGNORE
    h_ND, labels_N = h_BTD[counts], labels_BT[counts]
    if torch.is_grad_enabled():
        return ExitResult(*checkpoint(from_states, h_ND, labels_N, use_reentrant=False))
    return ExitResult(*from_states(h_ND, labels_N))
