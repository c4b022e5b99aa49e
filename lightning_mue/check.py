"""``mue check``: the properties that must hold, run on a backbone of the user's own.

Shapes: ``B`` rows, ``T`` tokens, ``D`` width.
"""

from __future__ import annotations

import copy
import importlib
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mue.backbones import Backbone, exit_streams, num_layers, view
from lightning_mue.exits import Exits, attach_exits, attached
from lightning_mue.inference import ExitEngine
from lightning_mue.inference.output import ExitOutput
from lightning_mue.inference.torch_executor import TorchExecutor
from lightning_mue.policy import ExitPolicy, ExitRule
from lightning_mue.training.depths import Step
from lightning_mue.training.objective import objective
from lightning_mue.training.supervised import decoder_states, encode, teacher_forced
from lightning_mue.training.supervision import Supervision

Inputs = Mapping[str, Any]
ROWS, TOKENS, CLOSE = 4, 8, 1e-3


class Unable(Exception):
    """A property that cannot be asked of this model, and why."""


@dataclass(frozen=True)
class Finding:
    """What came of one property: ``reason`` says why it does not hold, or was not asked."""

    name: str
    holds: bool | None
    reason: str = ""

    def __str__(self) -> str:
        word = {True: "ok", False: "FAILS", None: "skipped"}[self.holds]
        return f"{word:<9}{self.name}{': ' if self.reason else ''}{self.reason}"


@dataclass
class Subject:
    """A model under examination, with exits at every layer that may be left; weights of the exits are random.

    Args:
        plain: the model as it came, without exits.
        inputs: of ``ROWS`` samples.
    """

    plain: nn.Module
    inputs: Inputs

    @cached_property
    def model(self) -> nn.Module:
        """A copy with exits whose adapters are not zero."""
        model = copy.deepcopy(self.plain).eval().requires_grad_(False)
        backbone, config = view(model), dict[str, Any](adapter_width=8, gate_width=8)
        for name, count in exit_streams(backbone).items():
            first = backbone.decoder.first_exit if name == "decoder" else 1
            config |= {name: list(range(first, count))} if first < count else {}
        exits = attach_exits(model, config)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in exits.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(parameter))
        return model

    @property
    def backbone(self) -> Backbone:
        """Its streams."""
        return view(self.model)

    @property
    def exits(self) -> Exits:
        """Its exits."""
        exits = attached(self.model)
        assert exits is not None
        return exits

    def run(
        self, policy: ExitPolicy, inputs: Inputs | None = None, forced: Any = None, runtime: str = "torch"
    ) -> tuple[ExitOutput, TorchExecutor]:
        """Decode under a policy."""
        engine = ExitEngine(self.model, policy, runtime=runtime)
        given = dict(self.inputs if inputs is None else inputs)
        with torch.inference_mode():
            return engine.run(TOKENS, None, False, given, forced=forced)

    def tokens(self, policy: ExitPolicy, inputs: Inputs | None = None, runtime: str = "torch") -> list[list[int]]:
        """Return what is decoded under a policy."""
        found: list[list[int]] = self.run(policy, inputs, runtime=runtime)[0].sequences.tolist()
        return found

    @cached_property
    def full(self) -> list[list[int]]:
        """The tokens of full depth."""
        return self.tokens(ExitPolicy())


def check(factory: Callable[[], tuple[nn.Module, Callable[[int], Inputs]]]) -> Iterator[Finding]:
    """Yield whether each property holds.

    Args:
        factory: returns a model, small if it can be, and what makes the inputs of so many samples, padded as they will
            be.
    """
    model, make_inputs = factory()
    subject = Subject(model.eval(), make_inputs(ROWS))
    for name, examine in PROPERTIES.items():
        try:
            reason = examine(subject)
        except Unable as why:
            yield Finding(name, None, str(why))
        except Exception as error:  # whatever a view raises is what its author wants to know
            yield Finding(name, False, f"{type(error).__name__}: {error}")
        else:
            yield Finding(name, not reason, reason)


def named(spec: str) -> Callable[[], Any]:
    """Return the factory that ``module:name`` names; modules of the current folder are found too.

    Raises:
        ValueError: there is none.
    """
    module, _, name = spec.partition(":")
    if not name:
        raise ValueError(f"Name a factory as `module:function`, got {spec!r}")
    sys.path.insert(0, str(Path.cwd()))
    try:
        factory = getattr(importlib.import_module(module), name, None)
    finally:
        sys.path.pop(0)
    if not callable(factory):
        raise ValueError(f"{module!r} has no function {name!r}")
    return factory


def _attaching_changes_nothing(subject: Subject) -> str:
    before = view(subject.plain).generate(subject.inputs, num_beams=1, do_sample=False, max_new_tokens=TOKENS)
    after = subject.backbone.generate(subject.inputs, num_beams=1, do_sample=False, max_new_tokens=TOKENS)
    new = subject.model.state_dict().keys() - subject.plain.state_dict().keys()
    if missing := subject.plain.state_dict().keys() - subject.model.state_dict().keys():
        return f"weights are gone: {sorted(missing)[:3]}"
    if others := sorted(name for name in new if not name.startswith("mue_exits.")):
        return f"weights are new: {others[:3]}"
    return _differ(subject, after.tolist(), before.tolist(), "with exits", "without")


def _full_depth_is_the_models_own(subject: Subject) -> str:
    scored = {"return_dict_in_generate": True, "output_scores": True}
    own: Any = subject.backbone.generate(subject.inputs, num_beams=1, do_sample=False, max_new_tokens=TOKENS, **scored)
    if isinstance(own, Tensor):  # it gives no scores
        return _differ(subject, subject.full, own.tolist(), "the engine", "the view's `generate`")
    out, executor = subject.run(ExitPolicy())
    for row, step in (out.exit_depths["decoder"] > 0).nonzero().tolist():
        with torch.inference_mode():
            (found,) = executor.exit_logits(executor.num_layers, torch.tensor([row]), step)
        if not torch.allclose(found, own.scores[step][row], CLOSE, CLOSE):
            off = float((found - own.scores[step][row]).nan_to_num().abs().max())
            return f"the scores of row {row}, token {step} are off by {off:.2g} from the view's `generate`"
    return _differ(subject, subject.full, own.sequences.tolist(), "the engine", "the view's `generate`")


def _a_cache_changes_nothing(subject: Subject) -> str:
    return _states_differ(subject, *subject.run(ExitPolicy()))


def _just_in_time_is_exact(subject: Subject) -> str:
    layers = [*subject.exits.layers["decoder"], subject.backbone.decoder.num_layers]
    drawn = random.Random(0)
    forced = [[drawn.choice(layers) for _ in range(TOKENS)] for _ in range(ROWS)]
    out, executor = subject.run(ExitPolicy(), forced=forced)
    most = executor.num_layers * sum(len(depths.nonzero()) for depths in out.exit_depths["decoder"])
    if out.pairs > most:
        return f"{out.pairs} pairs of position and layer were computed; there are {most}"
    return _states_differ(subject, out, executor)


def _states_differ(subject: Subject, out: ExitOutput, executor: TorchExecutor) -> str:
    """Compare each state that chose a token with that of one pass over all tokens, without a cache."""
    backbone, settings = subject.backbone, subject.backbone.decode_settings(TOKENS)
    depth_BT, labels_BT = out.exit_depths["decoder"], out.sequences[:, 1:].clone()
    labels_BT[depth_BT == 0] = settings.pad_id
    with torch.inference_mode():
        ids_BT, _ = teacher_forced(backbone, {}, labels_BT)
        memory_BSD, _, _ = encode(backbone, subject.exits, subject.inputs, {})
        states = decoder_states(backbone, memory_BSD, backbone.memory_mask(subject.inputs), ids_BT)
    for row, step in (depth_BT > 0).nonzero().tolist():
        for layer in range(1, int(depth_BT[row, step]) + 1):
            found, expected = executor.states[layer, row, step], states[layer][row, step]
            if not torch.allclose(found, expected, CLOSE, CLOSE):
                off = float((found - expected).abs().max())
                return f"the state of row {row}, token {step} after layer {layer} is off by {off:.2g}"
    return ""


def _rows_are_alone(subject: Subject) -> str:
    policy = _static(subject)
    for given, what in ((ExitPolicy(), "full depth"), (policy, "exits")):
        together = subject.tokens(given)
        for row in range(ROWS):
            one = {name: value[row : row + 1] for name, value in subject.inputs.items()}
            (alone,) = subject.tokens(given, one)
            if together[row][: len(alone)] != alone:
                return f"row {row} of a batch says {together[row]}, alone {alone} ({what})"
    return ""


def _out_of_reach_is_full_depth(subject: Subject) -> str:
    rules = {
        name: ExitRule("similarity", layers, (float("inf"),) * len(layers))
        for name, layers in subject.exits.layers.items()
        if name in num_layers(subject.backbone)
    }
    return _differ(subject, subject.tokens(ExitPolicy(rules)), subject.full, "thresholds out of reach", "full depth")


def _drafts_lose_nothing(subject: Subject) -> str:
    policy = ExitPolicy({"decoder": ExitRule.static(subject.exits.layers["decoder"][0])}, verified=True)
    return _differ(subject, subject.tokens(policy), subject.full, "drafts that are verified", "full depth")


def _graphs_say_the_same(subject: Subject) -> str:
    try:
        found = subject.tokens(_static(subject), runtime="onnxruntime")
    except ImportError as error:
        raise Unable(str(error)) from error
    return _differ(subject, found, subject.tokens(_static(subject)), "ONNX Runtime", "torch")


def _every_exit_learns(subject: Subject) -> str:
    model = copy.deepcopy(subject.model).train().requires_grad_(True)
    backbone, exits = view(model), attached(model)
    assert exits is not None
    labels_BT: Tensor = torch.tensor(subject.full)[:, 1:]
    early = {name: layers[0] for name, layers in exits.layers.items() if name in num_layers(backbone)}
    del early["decoder"]
    for depths in ({}, early):
        objective(backbone, exits, subject.inputs, labels_BT, Step(depths), Supervision()).total.backward()
    passed = tuple(num_layers(backbone))
    still = [n for n, p in exits.named_parameters() if n.split(".")[1].startswith(passed) and p.grad is None]
    return f"no gradient reaches {still[:3]}" if still else ""


def _a_bundle_comes_back(subject: Subject) -> str:
    from lightning_mue.export import freeze, load

    if not hasattr(subject.model, "config"):
        raise Unable("the model has no config that would build it again")
    with TemporaryDirectory() as folder:
        freeze(subject.model, _static(subject), Path(folder, "bundle"))
        again = load(Path(folder, "bundle")).generate(TOKENS, **subject.inputs).sequences.tolist()
    return _differ(subject, again, subject.tokens(_static(subject)), "the bundle", "the model")


def _static(subject: Subject) -> ExitPolicy:
    passed = num_layers(subject.backbone)
    return ExitPolicy({n: ExitRule.static(k[-1]) for n, k in subject.exits.layers.items() if n in passed})


def _differ(subject: Subject, found: list[list[int]], expected: list[list[int]], what: str, other: str) -> str:
    ends, pairs = subject.backbone.decode_settings(None).end_ids, zip(found, expected, strict=True)
    rows = [row for row, (one, two) in enumerate(pairs) if _cut(one, ends) != _cut(two, ends)]
    return f"row {rows[0]}: {what} says {found[rows[0]]}, {other} {expected[rows[0]]}" if rows else ""


def _cut(row: list[int], ends: Sequence[int]) -> list[int]:
    """Leave out what follows the end of an answer: padding, which depends on the longest row."""
    end = next((i for i, token in enumerate(row) if i and token in ends), len(row))
    return row[: end + 1]


PROPERTIES: dict[str, Callable[[Subject], str]] = {
    "attaching exits changes no output": _attaching_changes_nothing,
    "full depth is the model's own greedy decoding": _full_depth_is_the_models_own,
    "a decode with a cache is one pass without": _a_cache_changes_nothing,
    "just-in-time features are exact, and computed once": _just_in_time_is_exact,
    "a row of a batch says what it says alone": _rows_are_alone,
    "thresholds out of reach are full depth": _out_of_reach_is_full_depth,
    "drafts that are verified lose nothing": _drafts_lose_nothing,
    "ONNX Runtime says the same": _graphs_say_the_same,
    "every exit learns": _every_exit_learns,
    "a bundle says the same": _a_bundle_comes_back,
}
"""What is asked -> examines it and returns what is wrong, nothing if it holds."""
