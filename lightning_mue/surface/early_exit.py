"""EarlyExit: the decoder leaves early inside transformers' own loop, which keeps choosing the tokens.

Its greedy, sampling and beam loops call ``forward`` with new tokens and read logits. For the time of one ``generate``
that ``forward`` is ours: the schedule's step, with our cache.
Shapes: ``R`` rows (beams and returned sequences are rows), ``T`` tokens, ``S`` memory tokens, ``D`` width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from threading import RLock
from typing import Any, cast
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import Seq2SeqLMOutput

from lightning_mue.backbones.generating import Memory
from lightning_mue.backbones.stream import TokenProcessor, additive_mask
from lightning_mue.inference import ExitEngine
from lightning_mue.inference.fed import FedDecoding
from lightning_mue.inference.request import decoder_exits
from lightning_mue.inference.stopwatch import Stopwatch
from lightning_mue.inference.torch_executor import TorchExecutor
from lightning_mue.policy import ExitPolicy

_LOOPS = {
    GenerationMode.GREEDY_SEARCH: "_sample",
    GenerationMode.SAMPLE: "_sample",
    GenerationMode.BEAM_SEARCH: "_beam_search",
    GenerationMode.BEAM_SAMPLE: "_beam_search",
}


class EarlyExit:
    """A ``custom_generate`` of transformers: the decoder obeys a policy; the encoder ran before, at full depth.

    Everything else is transformers' own: greedy, sampling, beams, ``num_return_sequences``, processors, criteria.
    Signals that read logits see them after the processors, but before what bends a distribution to draw from: so a
    processor is asked at each exit too, and must be a function of ids and scores alone.

    Args:
        policy: its rule for the decoder is obeyed.
        streamer: gets tokens as they come; transformers gives a ``custom_generate`` none of its own.
        check_fingerprint: refuse a policy made for other weights (hashing all weights takes a moment, once a model).
        whole: the supported model, where what generates is but a part of it; what generates itself if not given.

    Attributes:
        exit_depths: of each token of the latest call, int64 ``[R, T]``, 0 after a row's last; None after beams.

    Raises:
        ValueError: the policy asks for what transformers' loop cannot do.
    """

    def __init__(
        self, policy: ExitPolicy, streamer: Any = None, check_fingerprint: bool = True, whole: nn.Module | None = None
    ) -> None:
        _check(policy)
        self.policy, self.streamer, self._check_fingerprint, self._whole = policy, streamer, check_fingerprint, whole
        self._known: WeakSet[nn.Module] = WeakSet()
        self.exit_depths: Tensor | None = None

    def engine(self, model: nn.Module) -> ExitEngine:
        """Return the engine of a model, whose weights are looked at when it is first seen.

        Raises:
            ValueError: the policy does not fit the model.
        """
        engine = ExitEngine(model, self.policy, self._check_fingerprint and model not in self._known, runtime="torch")
        self._known.add(model)
        return engine

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Sequence[Any],
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        """Run the loop that the generation config asks for; transformers calls this.

        Raises:
            ValueError: another kind of generation, attentions or states to return, a padded decoder prompt, or a
                policy that does not fit the model.
        """
        mode = generation_config.get_generation_mode()
        if mode not in _LOOPS:
            raise ValueError(f"Exits go with greedy decoding, sampling and beams, not with {mode.value!r}.")
        if self.streamer is not None and generation_config.num_beams > 1:
            raise ValueError("A `streamer` gets tokens as they are chosen, and beams choose at the end; leave one out.")
        if generation_config.guidance_scale not in (None, 1.0):
            raise ValueError("`guidance_scale` asks the model a second time in each step; leave it out.")
        if generation_config.output_attentions or generation_config.output_hidden_states:
            raise ValueError("Layers that were left out have no attentions or states; leave `output_*` out.")
        decoding = self._begin(model, input_ids, logits_processor, generation_config, model_kwargs)
        if self.streamer is not None:
            self.streamer.put(input_ids.cpu())
        loop = getattr(type(model), _LOOPS[mode])
        given = {"logits_processor": logits_processor, "stopping_criteria": stopping_criteria}
        given |= {"generation_config": generation_config, "streamer": self.streamer}
        with one_at_a_time(model), _forward_by(model, _Step(decoding)) as step:
            cached = model_kwargs | {"past_key_values": step.cache, "use_cache": True}
            result = loop(model, input_ids, **given, **cached)
        beams = generation_config.num_beams > 1  # whose rows at the end are not those of the answers
        self.exit_depths = None if beams else _depths(decoding, result, input_ids.shape[1], generation_config)
        return result

    def _begin(
        self,
        model: nn.Module,
        input_ids: Tensor,
        logits_processor: Sequence[Any],
        generation_config: Any,
        model_kwargs: Mapping[str, Any],
    ) -> FedDecoding:
        engine = self.engine(model if self._whole is None else self._whole)
        memory_RSD, valid_RS, valid_RT = _read(engine, model_kwargs)
        if valid_RT is not None and not bool(valid_RT.all()):
            raise ValueError("Decoder prompts of one call must be of one length: their attention mask has zeros.")
        mask = additive_mask(None if valid_RS is None else valid_RS.bool(), memory_RSD.dtype)
        steps = generation_config.max_length - input_ids.shape[1]
        processors: list[TokenProcessor] = []
        silent = Stopwatch(memory_RSD.device, False)
        positions = generation_config.max_length - 1
        executor = TorchExecutor(engine.backbone, engine.exits, memory_RSD, mask, positions, processors, silent)
        processors.append(_of_all_rows(logits_processor, executor))
        return FedDecoding(executor, decoder_exits(self.policy, steps), input_ids.tolist(), steps)


def early_exit(policy: ExitPolicy, streamer: Any = None, check_fingerprint: bool = True) -> EarlyExit:
    """Return a ``custom_generate``: ``model.generate(**inputs, custom_generate=early_exit(policy))``.

    The decoder's exits alone; ``enable`` is of all streams. Arguments as of `EarlyExit`.
    """
    return EarlyExit(policy, streamer, check_fingerprint)


_BUSY: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()


def one_at_a_time(model: nn.Module) -> RLock:
    """Return the lock of a model: for the time of a ``generate`` its ``forward`` is another."""
    return _BUSY.setdefault(model, RLock())


def _depths(decoding: FedDecoding, result: Any, before: int, generation_config: Any) -> Tensor:
    """Return the depths of answer tokens: transformers goes on with rows that have ended."""
    sequences: Tensor = result if isinstance(result, Tensor) else result.sequences
    ends = generation_config.eos_token_id
    ends_E = torch.tensor([] if ends is None else ends, device=sequences.device).reshape(-1)
    is_end_RT = torch.isin(sequences[:, before:], ends_E)
    depth_RT = torch.tensor(decoding.record.depths, device=sequences.device)[:, : is_end_RT.shape[1]]
    ended_before_RT = (is_end_RT.cumsum(1) - is_end_RT.long()) > 0
    return depth_RT.masked_fill(ended_before_RT, 0)


class _Step:
    """A model's ``forward`` for the time of one loop, and the cache that the loop hands around."""

    def __init__(self, decoding: FedDecoding) -> None:
        self.decoding, self.cache = decoding, cast("Any", _Cache(decoding))

    @torch.inference_mode()
    def __call__(
        self, input_ids: Tensor | None = None, decoder_input_ids: Tensor | None = None, **_: Any
    ) -> Seq2SeqLMOutput:
        """Return the logits that choose the next tokens, ``[R, 1, V]``; a decoder alone gets them as `input_ids`."""
        decoding, ids_RT = self.decoding, input_ids if decoder_input_ids is None else decoder_input_ids
        assert ids_RT is not None
        if ids_RT.shape[1] > 1:  # the prompt; some models are given the whole answer so far in each step
            ids_RT = ids_RT[:, decoding.length :]
        left = decoding.feed(ids_RT.tolist())
        executor: Any = decoding.executor
        logits_RV = executor.logits(left)
        order_R = torch.tensor([row for places in left.values() for row, _ in places], device=logits_RV.device)
        return Seq2SeqLMOutput(logits=logits_RV[order_R.argsort()][:, None], past_key_values=self.cache)


class _Cache:
    """What transformers asks of a cache; the K/V themselves stay with the executor."""

    is_compileable = False

    def __init__(self, decoding: FedDecoding) -> None:
        self._decoding = decoding

    def get_seq_length(self, *_: Any) -> int:
        """Positions so far."""
        return self._decoding.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let beams go on from others."""
        self._decoding.follow(beam_idx.tolist())


@contextmanager
def _forward_by(model: nn.Module, step: _Step) -> Iterator[_Step]:
    """Let ``step`` be the model's ``forward``."""
    before = model.__dict__.get("forward")

    @wraps(model.forward)  # transformers looks which arguments it takes
    def forward(*args: Any, **kwargs: Any) -> Seq2SeqLMOutput:
        return step(*args, **kwargs)

    model.forward = forward
    try:
        yield step
    finally:
        del model.__dict__["forward"]
        if before is not None:
            model.forward = before


def _of_all_rows(processors: Sequence[Any], executor: TorchExecutor) -> TokenProcessor:
    """Return transformers' processors as one for some rows alone: they may count rows, or know them by number."""
    shaping: list[Callable[[Tensor, Tensor], Tensor]] = [
        processor for processor in processors if not type(processor).__name__.endswith("Warper")
    ]

    def process(ids_RT: Tensor, logits_RV: Tensor, rows: Sequence[int]) -> Tensor:
        if not shaping:
            return logits_RV
        every_BT = executor.sequences(ids_RT.shape[1])
        every_BV = logits_RV.new_zeros(executor.batch, logits_RV.shape[1])
        every_BV[list(rows)] = logits_RV
        for processor in shaping:
            every_BV = processor(every_BT, every_BV)
        return every_BV[list(rows)]

    return process


def _read(engine: ExitEngine, given: Mapping[str, Any]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return what the decoder reads, ``[R, S, D]``, where it and the decoder's prompts are no padding."""
    if (outputs := given.get("encoder_outputs")) is None:  # a decoder alone, with its own names for them
        return given["encoder_hidden_states"], given.get("encoder_attention_mask"), given.get("attention_mask")
    memory_RSD: Tensor = outputs.last_hidden_state
    if not isinstance(outputs, Memory):
        memory_RSD = engine.backbone.memory({_last_encoder(engine): memory_RSD})
    valid_RS = getattr(outputs, "attention_mask", None)  # UDOP's, whose memory is longer than its words
    valid_RS = given.get("attention_mask") if valid_RS is None else valid_RS
    return memory_RSD, valid_RS, given.get("decoder_attention_mask")


def _last_encoder(engine: ExitEngine) -> str:
    """Return the stream whose result transformers' encoder gives.

    Raises:
        ValueError: it gives another.
    """
    if len(engine.backbone.encoders) > 2:
        raise ValueError(
            "These exits take image and text apart in the encoder, which ran before `custom_generate`, and jointly: "
            "use `enable`, which runs all streams."
        )
    return engine.backbone.encoders[-1].name


def _check(policy: ExitPolicy) -> None:
    """Refuse what needs an engine's own loop."""
    for asked, what in (
        (policy.groups is not None, "promises by group"),
        (policy.verified, "drafts and verifies"),
        (policy.precision is not None, f"computes in {policy.precision}"),
        (policy.kv_fill != "just-in-time", f"makes up K/V by {policy.kv_fill!r}"),
    ):
        if asked:
            raise ValueError(f"The policy {what}, which transformers' `generate` cannot do; use an ExitEngine.")
