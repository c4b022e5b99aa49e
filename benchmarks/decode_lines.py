"""The lines of the decoders' cost table (``decode.py``): what decodes a case, and the check that it does.

A line is an entry of ``LINES``. Another executor's three are one more ``engine_lines`` there; what they share beside
the model, such as sessions, is made ``once`` by the case.

Shapes: ``B`` rows, ``S`` memory tokens, ``T`` steps, ``D`` width, ``V`` vocabulary, ``L`` layers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from decode_case import START, Case, Clock, just_in_time_pairs
from transformers.modeling_outputs import BaseModelOutput

from lightning_mue.backbones import view
from lightning_mue.inference.schedule import DecoderExits, Executor, decode
from lightning_mue.inference.sessions import decoder_sessions, make_executor
from lightning_mue.inference.stopwatch import Stopwatch
from lightning_mue.inference.torch_executor import TorchExecutor

BASELINE, ASSISTED = "generate fp32 sdpa", "generate fp32 assisted"
SCHEDULES = ("full", "static", "ragged")
ROUNDING, ALIKE = 1e-3, 0.5
"""A token is the model's if its logit is so near the largest; in lower precision so many tokens must be."""


ExecutorOf = Callable[[Case], Callable[..., Executor]]
"""Case -> what makes an executor of (exits, memory, its mask, positions, processors, stopwatch)."""


@dataclass(frozen=True)
class Answer:
    """What one decode gave.

    Args:
        tokens: row -> tokens chosen.
        depths: row -> exit depth of each token; None for ``generate``.
        pairs: computed (position, layer) pairs.
        parts: of our decodes -> milliseconds.
        cache: bytes of K/V held at the end: of the answer itself and of the memory.
    """

    tokens: list[list[int]]
    depths: list[list[int]] | None = None
    pairs: int = 0
    parts: Mapping[str, float] = field(default_factory=dict)
    cache: tuple[int, int] = (0, 0)


class Unavailable(Exception):
    """A line that cannot decode a case; the message says why."""


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Args:
        precision: ``fp32``, ``bf16`` or ``int8``.
        prepare: case -> what decodes once; whatever it does beforehand is not timed.
        full: name of the line that does the same at full depth; None for ``generate``.
        schedule: which of the case's depths are forced; None for ``generate``.
        executor_of: makes what runs our engine's layers.
    """

    precision: str
    prepare: Callable[[Case], Callable[[], Answer]]
    full: str | None = None
    schedule: str | None = None
    executor_of: ExecutorOf | None = None


def generate_line(precision: str, attention: str) -> Line:
    """Return transformers' own greedy ``generate``."""
    return Line(precision, lambda case: _generate(case, precision, case.model(precision, attention)))


def _generate(case: Case, precision: str, model: Any, **more: Any) -> Callable[[], Answer]:
    """Return what decodes by ``generate`` of a model; ``more`` are its settings."""
    memory_BSD = case.memory(precision)
    given = {
        "encoder_outputs": BaseModelOutput(last_hidden_state=memory_BSD),
        "attention_mask": torch.ones(memory_BSD.shape[:2], dtype=torch.long),
    }
    settings = {"max_new_tokens": case.shape.steps, "do_sample": False, "num_beams": 1} | more

    def run() -> Answer:
        out = model.generate(**given, **settings, return_dict_in_generate=True)
        both = out.past_key_values.self_attention_cache, out.past_key_values.cross_attention_cache
        own, memory = (sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) for cache in both)
        return Answer(out.sequences[:, 1:].tolist(), cache=(own, memory))

    return run


def assisted_line() -> Line:
    """Return ``generate`` with an assistant: the model itself, cut after half of its decoder layers.

    The assistant shares all weights. As it is, the library gives an assistant with an encoder no ``encoder_outputs``
    (``AssistedCandidateGenerator`` takes its encoder to be another one) and has it encode once more; here it is given
    the memory that is there. With random weights drafts are hardly ever right: how often the last layer ran is noted.
    """

    def prepare(case: Case) -> Callable[[], Answer]:
        model = case.model()
        assistant = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
        assistant.model.language_model.decoder.layers = assistant.model.language_model.decoder.layers[: case.half]
        assistant.config.text_config.decoder_layers = case.half
        memory = BaseModelOutput(last_hidden_state=case.memory("fp32"))
        assistant._maybe_prepare_encoder_kwargs_for_generation = lambda _inputs, given, *_: (
            given | {"encoder_outputs": memory}
        )
        passes: list[None] = []
        hook = model.model.language_model.decoder.layers[-1].register_forward_pre_hook(lambda *_: passes.append(None))
        try:
            run = tried(_generate(case, "fp32", model, assistant_model=assistant))
        finally:
            hook.remove()
        case.notes[ASSISTED] = f"the last layer ran {len(passes)} times for {case.shape.steps} tokens"
        return run

    return Line("fp32", prepare)


def compiled_line() -> Line:
    """Return ``generate`` of the compiled forward: a minute or more, and a C++ compiler."""

    def prepare(case: Case) -> Callable[[], Answer]:
        model = copy.deepcopy(case.model())
        model.forward = torch.compile(model.forward, dynamic=True)
        return tried(_generate(case, "fp32", model))

    return Line("fp32", prepare)


def tried(run: Callable[[], Answer]) -> Callable[[], Answer]:
    """Return what runs, if it does.

    Raises:
        Unavailable: it does not.
    """
    try:
        run()
    except Exception as error:  # whatever a library cannot do here is said
        raise Unavailable(f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}") from error
    return run


def engine_lines(name: str, precision: str, executor_of: ExecutorOf) -> dict[str, Line]:
    """Return an executor's lines: ``<name> full``, ``<name> static`` and ``<name> ragged``."""
    return {
        f"{name} {schedule}": Line(
            precision, partial(_prepare, executor_of, precision, schedule), f"{name} full", schedule, executor_of
        )
        for schedule in SCHEDULES
    }


def _prepare(executor_of: ExecutorOf, precision: str, schedule: str, case: Case) -> Callable[[], Answer]:
    make, memory_BSD, steps = executor_of(case), case.memory(precision), case.shape.steps
    exits = DecoderExits("static", lambda _step: {}, forced=case.depths[schedule])

    def run() -> Answer:
        watch = Parts(case.clock)
        executor = make(None, memory_BSD, None, steps, (), watch)
        record = decode(executor, exits, [[START]] * case.batch, (), steps)
        return Answer(record.tokens, record.depths, record.pairs, watch.ms, held(executor))

    return run


def held(executor: Any) -> tuple[int, int]:
    """Return the bytes of an executor's K/V: of the answer itself, and of the memory."""
    stored = executor._memory_kv
    memory = [pair for pair in (stored.values() if isinstance(stored, dict) else stored) if pair is not None]
    return executor._keys.nbytes + executor._values.nbytes, sum(kv.nbytes for pair in memory for kv in pair)


class Parts(Stopwatch):
    """A stopwatch on the clock of the measurement."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(torch.device("cpu"), True)
        self._clock = clock

    def _now(self) -> float:
        return self._clock() * 1e3


def torch_executor(precision: str, attention: str, case: Case) -> Callable[..., Executor]:
    """Return what makes a ``TorchExecutor`` of the model in this precision and with this attention."""
    return partial(TorchExecutor, view(case.model(precision, attention)))


def ort_executor(precision: str, screened: bool, case: Case) -> Callable[..., Executor]:
    """Return what makes an executor of ONNX Runtime, of sessions in this precision.

    Args:
        precision: of the sessions.
        screened: with the screened head; without, all tokens are scored in float32, to show what it is worth.
        case: what is decoded.
    """
    backbone = view(case.model())
    sessions = case.once(("ORT", precision), lambda: decoder_sessions(backbone.decoder, precision))

    def make(*given: Any) -> Executor:
        executor = make_executor(sessions, backbone, *given)
        if not screened:
            executor.best = lambda h_RD, *_: sessions.head(h_RD).argmax(-1)
        return executor

    return make


LINES: dict[str, Line] = {
    **{f"generate {p} {a}": generate_line(p, a) for p in ("fp32", "bf16", "int8") for a in ("sdpa", "eager")},
    ASSISTED: assisted_line(),
    **engine_lines("torch fp32", "fp32", partial(torch_executor, "fp32", "sdpa")),
    **engine_lines("torch bf16 sdpa", "bf16", partial(torch_executor, "bf16", "sdpa")),
    **engine_lines("torch bf16 eager", "bf16", partial(torch_executor, "bf16", "eager")),
    **engine_lines("ORT fp32", "fp32", partial(ort_executor, "float32", False)),
    **engine_lines("ORT fp32 screened", "fp32", partial(ort_executor, "float32", True)),
    **engine_lines("ORT int8", "int8", partial(ort_executor, "int8", True)),
}

COMPILED = {"generate fp32 compiled": compiled_line()}


def check(case: Case, name: str, line: Line, answer: Answer, full: Answer) -> None:
    """Refuse a line that decodes something else; ``full`` is what ``generate`` says in fp32.

    Raises:
        ValueError: what the line must do, and what it did.
    """
    sizes = [len(tokens) for tokens in answer.tokens]
    if sizes != [case.shape.steps] * case.batch:
        raise ValueError(f"{name!r} must choose {case.shape.steps} tokens in each of {case.batch} rows, got {sizes}")
    if line.schedule is not None:
        asked = case.depths[line.schedule]
        found, pairs = "these" if answer.depths == asked else "other", just_in_time_pairs(asked)
        if found == "other" or answer.pairs != pairs:
            raise ValueError(
                f"{name!r} must leave at the {line.schedule} depths and compute {pairs} pairs for them, got {found} "
                f"depths and {answer.pairs} pairs"
            )
    right, needed = share_right(case, answer), 1.0 if line.precision == "fp32" else ALIKE
    if right < needed:
        raise ValueError(
            f"{name!r} must choose what the fp32 model says at its depths for {needed:.0%} of tokens, got {right:.1%}"
        )
    if line.precision == "fp32" and line.schedule in (None, "full") and answer.tokens != full.tokens:
        raise ValueError(f"{name!r} must choose the tokens of {BASELINE!r}, got others; at a tie, try another --seed")


def share_right(case: Case, answer: Answer) -> float:
    """Return the share of tokens that the fp32 model, reading the whole answer at once, says at the same depths."""
    model, tokens_BT = case.model(), torch.tensor(answer.tokens)
    depths_BT = torch.tensor(answer.depths or case.depths["full"])
    given_BT = torch.cat([torch.full_like(tokens_BT[:, :1], START), tokens_BT[:, :-1]], 1)
    memory = BaseModelOutput(last_hidden_state=case.memory("fp32"))
    found = model.model(decoder_input_ids=given_BT, encoder_outputs=memory, output_hidden_states=True, use_cache=False)
    states_LBTD = torch.stack(found.decoder_hidden_states)
    at_LBTD = depths_BT[None, ..., None].expand(1, *states_LBTD.shape[1:])
    logits_BTV = model.lm_head(states_LBTD.gather(0, at_LBTD)[0])
    short_BT = logits_BTV.amax(-1) - logits_BTV.gather(-1, tokens_BT[..., None])[..., 0]
    return float((short_BT <= ROUNDING).float().mean())
