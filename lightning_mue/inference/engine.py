"""The engine: a backbone, its exits and a policy, ready to answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_mue.backbones import Backbone, DecodeSettings, fingerprint, unwrapped, view
from lightning_mue.exits import Exits, attached
from lightning_mue.inference.answering import Answering
from lightning_mue.inference.answers import ClosedAnswers
from lightning_mue.inference.beam_schedule import decode_beams
from lightning_mue.inference.beams import BeamSettings, beam_settings
from lightning_mue.inference.check import check_policy
from lightning_mue.inference.drafting import LONGEST, DraftLengths
from lightning_mue.inference.encode import Encoded, OnExit, encode
from lightning_mue.inference.output import ExitOutput, joined
from lightning_mue.inference.request import by_group, check_inputs, decoder_exits, longest_answer
from lightning_mue.inference.rows import PrefixFn, asked_once, constraint_of, of_beams, rows_of
from lightning_mue.inference.runtime import in_precision, make_runtime
from lightning_mue.inference.sampling import Sampling, sampling_settings
from lightning_mue.inference.schedule import DecodeRecord, decode
from lightning_mue.inference.stopwatch import Stopwatch
from lightning_mue.inference.torch_executor import TorchExecutor
from lightning_mue.policy import ExitPolicy
from lightning_mue.prompt import read_prompts


class ExitEngine(Answering):
    """Generates under an exit policy: greedy, beams or samples; ``ExitPolicy.full_depth()`` is the plain model.

    Args:
        model: a supported backbone, with exits attached if the policy needs them. It is put into eval mode; a policy of
            lower precision makes a copy.
        policy: what may be left when.
        check_fingerprint: refuse a policy made for other weights (hashing all weights takes a moment).
        processor: makes tensors of pictures and prompts and text of tokens; only ``answer`` needs it.
        runtime: what runs the layers: the backbone's own in ``torch``, or graphs of them in ``onnxruntime`` on the
            CPU; the same tokens in float32. ``auto`` tries both; if not given, what the policy was calibrated for.

    Raises:
        ValueError: the policy names unknown streams, layers or signals, or belongs to other weights.
        ImportError: the runtime is not installed.
    """

    def __init__(
        self,
        model: nn.Module,
        policy: ExitPolicy,
        check_fingerprint: bool = True,
        processor: Any = None,
        runtime: str | None = None,
    ) -> None:
        model = unwrapped(model)
        self.original = model.eval()
        self.model = in_precision(model, policy.precision)
        self.processor = processor
        self.backbone: Backbone = view(self.model)
        self.exits: Exits | None = attached(self.model)
        self.policy = policy
        check_policy(policy, self.backbone, self.exits)
        self._runtime = make_runtime(runtime or policy.runtime, self.backbone, policy.precision)
        self.runtime = self._runtime.name
        self._drafting = DraftLengths()
        if check_fingerprint and policy.fingerprint is not None and policy.fingerprint != (found := fingerprint(model)):
            raise ValueError(
                f"The policy was calibrated for weights with fingerprint {policy.fingerprint}, this model has {found}; "
                "calibrate again."
            )

    @torch.inference_mode()
    def generate(
        self,
        max_new_tokens: int | None = None,
        prefix_allowed_tokens_fn: PrefixFn | None = None,
        timings: bool = False,
        groups: Sequence[str] | None = None,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        early_stopping: bool | Literal["never"] = False,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | Sequence[int] = 0,
        **inputs: Any,
    ) -> ExitOutput:
        """Answer a batch; every row leaves every stream at its own layer.

        Args:
            max_new_tokens: at most; if not given, as certified, else as the generation config says.
            prefix_allowed_tokens_fn: transformers' constraint on the next token, such as a closed set of answers; it is
                shown the start token and the answer so far, no decoder prompt.
            timings: measure the parts.
            groups: the group of each row, for a policy that promises by group; others than its own run at full depth.
            num_beams: more than one searches with beams, which leave one by one; certificates are of one.
            length_penalty: of beams, as of transformers.
            early_stopping: of beams, as of transformers.
            do_sample: draw tokens; certificates are of the best ones. The noise depends on a row, a position and the
                seed alone (`Sampling.noise`), so exits, drafts and both runtimes draw alike. A generation config's
                settings of sampling are not read.
            temperature: of sampling, as of transformers; signals are asked before it (``patience`` sees what is drawn).
            top_k: of sampling; 0 (transformers' own default is 50) is all tokens. With this and the next the vocabulary
                head computes all logits in float32, which takes longer.
            top_p: of sampling, as of transformers.
            seed: of sampling; or one for each row, which is then drawn as alone.
            **inputs: the backbone's own, such as ``pixel_values`` and ``input_ids``; and ``decoder_prompt [B, P]``:
                tokens that the decoder reads before it answers, padded with -100 on the right. Others are ignored.
        """
        beams = beam_settings(num_beams, length_penalty, early_stopping)
        drawn = sampling_settings(do_sample, temperature, top_k, top_p, seed, num_beams)
        if self.policy.groups is None:
            return self.run(max_new_tokens, prefix_allowed_tokens_fn, timings, inputs, beams=beams, sampling=drawn)[0]
        check_inputs(inputs)
        names = self.backbone.generate_inputs
        size, rows, others = by_group(self.policy, groups, inputs, names)
        if drawn is not None:
            drawn.check(size)
        parts = []
        for engine, mine in zip(self._by_group, (rows, others), strict=True):
            if mine:
                allowed, given = constraint_of(prefix_allowed_tokens_fn, mine), rows_of(inputs, names, mine)
                of_mine = drawn and drawn.of_rows(mine)
                out, _ = engine.run(max_new_tokens, allowed, timings, given, beams=beams, sampling=of_mine)
                parts.append((mine, out))
        return joined(parts, size, self.backbone.decode_settings(None).pad_id)

    @property
    def reads_prompts(self) -> bool:
        """Whether the model reads a prompt beside the picture."""
        return "input_ids" in self.backbone.generate_inputs

    def end_id(self) -> int:
        """Return the token that ends an answer."""
        return self.backbone.decode_settings(None).end_ids[0]

    def place(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return tensors on the model's device."""
        device = next(self.model.parameters()).device
        return {name: tensor.to(device) for name, tensor in inputs.items()}

    def run(
        self,
        max_new_tokens: int | None,
        prefix_fn: PrefixFn | None,
        timings: bool,
        inputs: dict[str, Any],
        on_exit: OnExit | None = None,
        forced: Sequence[Sequence[int]] | None = None,
        beams: BeamSettings | None = None,
        sampling: Sampling | None = None,
    ) -> tuple[ExitOutput, TorchExecutor]:
        """``generate``, returning the executor too: a trace is made of its states and of what ``on_exit`` sees.

        ``forced`` replays known decoder depths (row -> depth of each token) and asks no signal.

        Raises:
            ValueError: the policy is of groups, whose rows `generate` answers apart.
        """
        if self.policy.groups is not None:
            raise ValueError(f"The policy leaves early for the groups {list(self.policy.groups)} alone: use `generate`")
        inputs = self._given(inputs)
        closed = prefix_fn.tokens if isinstance(prefix_fn, ClosedAnswers) else None
        prefix_fn = asked_once(prefix_fn) if prefix_fn is not None else None
        settings = self.backbone.decode_settings(longest_answer(self.policy, max_new_tokens))
        watch = Stopwatch(next(self.model.parameters()).device, timings)
        with watch.part("total"):
            encoded = encode(
                self.backbone, self.exits, inputs, self.policy.rules, watch, on_exit, self._runtime.streams
            )
            prompts = read_prompts(inputs, len(encoded.memory_BSD), settings.start_id)
            given = (self.backbone, self.exits, encoded.memory_BSD, self.backbone.memory_mask(inputs))
            if sampling is not None and sampling.rows is None:
                sampling.check(len(prompts))
            rows = [prompt for prompt in prompts for _ in range(1 if beams is None else beams.num_beams)]
            allowed = of_beams(prefix_fn, len(rows) // len(prompts))
            executor = self._runtime.executor(
                *given,
                max(map(len, prompts)) - 1 + settings.max_new_tokens,
                self.backbone.token_processors(settings, allowed, rows),
                watch,
                beams=len(rows) // len(prompts),
                closed=closed,
                sampling=sampling,
            )
            exits = decoder_exits(self.policy, settings.max_new_tokens, forced)
            if self.policy.verified:
                first = min(self.policy.rules["decoder"].reachable, default=executor.num_layers)
                few, silent = min(LONGEST, self.backbone.decoder.max_positions), Stopwatch(None, False)
                measured = partial(self._runtime.executor, *given, few, (), silent, closed=closed)
                exits = replace(exits, drafting=self._drafting.of(len(prompts), first, few, measured))
            how = (executor, exits, prompts, settings.end_ids, settings.max_new_tokens)
            record = decode(*how) if beams is None else decode_beams(*how, beams)
        return _output(encoded, record, settings, prompts, watch), executor

    @cached_property
    def _by_group(self) -> tuple[ExitEngine, ExitEngine]:
        """What answers the rows of the policy's groups, and all others."""
        how: dict[str, Any] = {"check_fingerprint": False, "runtime": self.runtime}
        plain = ExitPolicy(certificate=self.policy.certificate)
        return ExitEngine(self.model, replace(self.policy, groups=None), **how), ExitEngine(self.original, plain, **how)

    def _given(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return what the backbone reads of the inputs, in the precision that it computes in."""
        check_inputs(inputs)
        inputs = {name: inputs[name] for name in self.backbone.generate_inputs if inputs.get(name) is not None}
        if self.policy.precision is None:
            return inputs
        dtype = next(self.model.parameters()).dtype
        return {name: v.to(dtype) if v.is_floating_point() else v for name, v in inputs.items()}


def _output(
    encoded: Encoded,
    record: DecodeRecord,
    settings: DecodeSettings,
    prompts: Sequence[Sequence[int]],
    watch: Stopwatch,
) -> ExitOutput:
    sequences, depths = _as_tensors(record, settings.start_id, settings.pad_id)
    return ExitOutput(
        sequences.to(encoded.memory_BSD.device),
        encoded.depths | {"decoder": depths},
        encoded.layer_runs | {"decoder": record.layer_runs},
        torch.tensor([len(prompt) - 1 for prompt in prompts]),
        record.pairs,
        record.filled,
        watch.ms,
        record.drafted,
        record.agreed,
    )


def _as_tensors(record: DecodeRecord, start_id: int, pad_id: int) -> tuple[Tensor, Tensor]:
    """Return sequences ``[B, 1 + T]`` and decoder depths ``[B, T]``."""
    longest = max(len(tokens) for tokens in record.tokens)
    sequences = [[start_id, *t, *[pad_id] * (longest - len(t))] for t in record.tokens]
    depths = [[*d, *[0] * (longest - len(d))] for d in record.depths]
    return torch.tensor(sequences), torch.tensor(depths)
