"""PortableEngine: a bundle of graphs, ready to answer with onnxruntime, numpy, tokenizers and Pillow alone."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lightning_mue.inference.answering import Answering
from lightning_mue.inference.answers import ClosedAnswers
from lightning_mue.inference.beam_schedule import decode_beams
from lightning_mue.inference.beams import BeamSettings, beam_settings
from lightning_mue.inference.drafting import LONGEST, DraftLengths
from lightning_mue.inference.ort_executor import OrtExecutor
from lightning_mue.inference.output import ExitOutput, joined
from lightning_mue.inference.request import by_group, check_inputs, decoder_exits, longest_answer
from lightning_mue.inference.rows import PrefixFn, asked_once, constraint_of, of_beams, rows_of
from lightning_mue.inference.sampling import Sampling, sampling_settings
from lightning_mue.inference.schedule import DecodeRecord, decode
from lightning_mue.inference.stopwatch import Stopwatch
from lightning_mue.policy import ExitPolicy
from lightning_mue.portable.decoder import GraphsOutside, decoder_sessions
from lightning_mue.portable.encode import Encoded, encode
from lightning_mue.portable.files import GraphFiles
from lightning_mue.portable.names import POLICY, PROCESSOR
from lightning_mue.portable.processor import PortableProcessor
from lightning_mue.portable.token_rules import token_rules
from lightning_mue.prompt import read_prompts

Array = np.ndarray


class PortableEngine(Answering):
    """Generates as `ExitEngine` does, from arrays to arrays; the policy is the bundle's.

    Args:
        folder: of a bundle that ``freeze(..., runtime="onnxruntime")`` wrote; its files have been checked.
        threads: of one call; as many as this process may use if not given.
    """

    runtime = "onnxruntime"

    def __init__(self, folder: str | os.PathLike[str], threads: int | None = None) -> None:
        self.files = GraphFiles(Path(folder), threads)
        self.policy = ExitPolicy.load(Path(folder, POLICY))
        self.processor = PortableProcessor(Path(folder, PROCESSOR), self.files.facts["tasks"])
        self._decoder = decoder_sessions(self.files)
        self._outside = GraphsOutside(self.files, self._decoder)
        self._drafting = DraftLengths()

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
            prefix_allowed_tokens_fn: a constraint on the next token; it is shown a row, and the start token and the
                answer so far as an array.
            timings: measure the parts.
            groups: the group of each row, for a policy that promises by group; others than its own run at full depth.
            num_beams: more than one searches with beams, which leave one by one; certificates are of one.
            length_penalty: of beams, as of transformers.
            early_stopping: of beams, as of transformers.
            do_sample: draw tokens; certificates are of the best ones. The noise depends on a row, a position and the
                seed alone (`Sampling.noise`), so exits, drafts and both runtimes draw alike. A generation config's
                settings of sampling are not read.
            temperature: of sampling, as of transformers; signals are asked before it.
            top_k: of sampling; 0 (transformers' own default is 50) is all tokens. With this and the next the vocabulary
                head computes all logits in float32, which takes longer.
            top_p: of sampling, as of transformers.
            seed: of sampling; or one for each row, which is then drawn as alone.
            **inputs: arrays: ``pixel_values``, ``input_ids``, ``attention_mask`` (all ones if not given), and
                ``decoder_prompt [B, P]``, padded with -100 on the right. Others are ignored.

        Returns:
            The output, its tensors as arrays.

        Raises:
            ValueError: arrays that do not fit the bundle's graphs.
        """
        check_inputs(inputs)
        given, plain = self._given(inputs), replace(self.policy, groups=None)
        how = (max_new_tokens, timings, beam_settings(num_beams, length_penalty, early_stopping))
        drawn = sampling_settings(do_sample, temperature, top_k, top_p, seed, num_beams)
        if self.policy.groups is None:
            return self._run(plain, prefix_allowed_tokens_fn, given, *how, drawn)
        size, rows, others = by_group(self.policy, groups, given, [*given])
        if drawn is not None:
            drawn.check(size)
        parts = []
        for policy, mine in ((plain, rows), (ExitPolicy(certificate=self.policy.certificate), others)):
            if mine:
                allowed = constraint_of(prefix_allowed_tokens_fn, mine)
                of_mine = rows_of(given, [*given], mine)
                parts.append((mine, self._run(policy, allowed, of_mine, *how, drawn and drawn.of_rows(mine))))
        return joined(parts, size, self.files.facts["decode"]["pad_id"])

    @property
    def reads_prompts(self) -> bool:
        """Whether the model reads a prompt beside the picture."""
        return "most_tokens" in self.files.facts["inputs"]

    def end_id(self) -> int:
        """Return the token that ends an answer."""
        end_id: int = self.files.facts["decode"]["end_ids"][0]
        return end_id

    def _run(
        self,
        policy: ExitPolicy,
        allowed: PrefixFn | None,
        inputs: dict[str, Array],
        max_new_tokens: int | None,
        timings: bool,
        beams: BeamSettings | None,
        sampling: Sampling | None,
    ) -> ExitOutput:
        settings, watch = self.files.facts["decode"], Stopwatch(None, timings)
        asked = longest_answer(policy, max_new_tokens)
        steps = settings["max_new_tokens"] if asked is None else asked
        if steps < 1:
            raise ValueError(f"`max_new_tokens` must be at least 1, got {steps}")
        closed, allowed = (
            allowed.tokens if isinstance(allowed, ClosedAnswers) else None,
            None if allowed is None else asked_once(allowed),
        )
        with watch.part("total"):
            encoded = encode(self.files, inputs, policy.rules, watch)
            prompts = read_prompts(inputs, len(encoded.memory_BSD), settings["start_id"])
            if sampling is not None and sampling.rows is None:
                sampling.check(len(prompts))
            make = partial(OrtExecutor, self._decoder, self._outside, encoded.memory_BSD, encoded.bias_BS)
            count = 1 if beams is None else beams.num_beams
            rules = token_rules(
                settings, steps, of_beams(allowed, count), [prompt for prompt in prompts for _ in range(count)]
            )
            executor = make(max(map(len, prompts)) - 1 + steps, rules, watch, count, closed, sampling)
            exits = decoder_exits(policy, steps)
            if policy.verified:
                first = min(policy.rules["decoder"].reachable, default=executor.num_layers)
                few = min(LONGEST, self._decoder.max_positions)
                measured = partial(make, few, (), Stopwatch(None, False), closed=closed)
                exits = replace(exits, drafting=self._drafting.of(len(prompts), first, few, measured))
            how = (executor, exits, prompts, settings["end_ids"], steps)
            record = decode(*how) if beams is None else decode_beams(*how, beams)
        return _output(encoded, record, settings, prompts, watch)

    def _given(self, inputs: Mapping[str, Any]) -> dict[str, Array]:
        """Return what the graphs read of the inputs, as they want it."""
        facts, pixels = self.files.facts["inputs"], np.asarray(inputs["pixel_values"], np.float32)
        found: dict[str, Array] = {"pixel_values": pixels}
        if inputs.get("decoder_prompt") is not None:
            found["decoder_prompt"] = np.asarray(inputs["decoder_prompt"], np.int64)
        if list(pixels.shape[1:]) != facts["picture"]:
            raise ValueError(
                f"`pixel_values` must be [B, {', '.join(map(str, facts['picture']))}], the size that was frozen; got "
                f"{list(pixels.shape)}"
            )
        return found | self._given_prompt(inputs) if self.reads_prompts else found

    def _given_prompt(self, inputs: Mapping[str, Any]) -> dict[str, Array]:
        """Return the prompt, which may hold the picture's tokens."""
        facts, ids_BS = self.files.facts["inputs"], np.asarray(inputs["input_ids"], np.int64)
        mask, wanted = inputs.get("attention_mask"), facts["image_tokens"]
        mask_BS = np.ones_like(ids_BS) if mask is None else np.asarray(mask, np.int64)
        counts = (ids_BS == self.processor.image_token_id).sum(1) if wanted else np.zeros(len(ids_BS), np.int64)
        if (counts != wanted).any() or ids_BS.shape[1] <= wanted:
            raise ValueError(
                f"Every row of `input_ids` must hold {wanted} image tokens, and text; got {counts.tolist()} of "
                f"{ids_BS.shape[1]}"
            )
        if facts["most_tokens"] is not None and ids_BS.shape[1] > facts["most_tokens"]:
            raise ValueError(
                f"The prompt has {ids_BS.shape[1]} tokens, image tokens included; the encoder takes "
                f"{facts['most_tokens']}"
            )
        return {"input_ids": ids_BS, "attention_mask": mask_BS}


def _output(
    encoded: Encoded,
    record: DecodeRecord,
    settings: Mapping[str, Any],
    prompts: Sequence[Sequence[int]],
    watch: Stopwatch,
) -> ExitOutput:
    longest = max(map(len, record.tokens))
    sequence_BT = np.full((len(prompts), 1 + longest), settings["pad_id"])
    sequence_BT[:, 0] = settings["start_id"]
    depth_BT = np.zeros((len(prompts), longest), np.int64)
    for row, (tokens, depths) in enumerate(zip(record.tokens, record.depths, strict=True)):
        sequence_BT[row, 1 : 1 + len(tokens)], depth_BT[row, : len(depths)] = tokens, depths
    found: Any = (
        sequence_BT,
        encoded.depths | {"decoder": depth_BT},
        encoded.layer_runs | {"decoder": record.layer_runs},
        np.array([len(prompt) - 1 for prompt in prompts]),
        record.pairs,
        record.filled,
        watch.ms,
        record.drafted,
        record.agreed,
    )
    return ExitOutput(*found)
