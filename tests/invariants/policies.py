"""Policies under which the samples and tokens of a batch leave at many different layers."""

from typing import Any

import torch

from lightning_mue.backbones import view
from lightning_mue.exits import attached
from lightning_mue.inference import ExitEngine
from lightning_mue.inference.encode import encode, stream_scores
from lightning_mue.inference.ort_executor import OrtExecutor
from lightning_mue.inference.stopwatch import Stopwatch
from lightning_mue.inference.torch_executor import TorchExecutor
from lightning_mue.policy import ExitPolicy, ExitRule
from tests import zoo

STEPS = 12
RUNTIME = "torch"
"""What runs the layers; conftest sets it in turn to each there is."""

KEPT = set()

CLOSED = (11, 12, 13)
"""So few tokens that the exits of a random model often agree, which patience needs."""


def engine_of(model, policy):
    """Return the engine in the runtime of this turn; what engines share is kept, for making it takes longest."""
    engine = ExitEngine(model, policy, runtime=RUNTIME)
    KEPT.add(engine._runtime.held)
    return engine


def executor_class():
    """Return what executes in it."""
    return {"torch": TorchExecutor, "onnxruntime": OrtExecutor}[RUNTIME]


@torch.inference_mode()
def generate(model, policy, tensors, forced=None, closed=None):
    """Run the engine, with closed answers if asked, or if not said and the decoder's signal is patience."""
    rule = policy.rules.get("decoder")
    closed = rule is not None and rule.signal == "patience" if closed is None else closed
    prefix_fn = (lambda _row, _ids: list(CLOSED)) if closed else None
    return engine_of(model, policy).run(STEPS, prefix_fn, False, tensors, forced=forced)


@torch.inference_mode()
def decoder_rule(model, name, tensors, signal, share=0.35, **more: Any):
    """A rule under which about ``share`` of the tokens leave at each exit: thresholds are quantiles at full depth.

    They lie a little lower, for on a score itself its last bits would decide.
    """
    layers = zoo.exit_layers(name)["decoder"]
    if signal == "patience":
        return ExitRule(signal, layers, [2.0] * len(layers), **more)
    out, executor = generate(model, ExitPolicy.full_depth(), tensors)
    steps = out.exit_depths["decoder"].T > 0  # rows that have ended have no scores
    thresholds = []
    for k in layers:
        scores = []
        for position, live in enumerate(steps):
            rows = live.nonzero()[:, 0]
            found = executor.scores(signal, k, rows, position, executor.exit_logits(k, rows, position))
            scores.append(torch.as_tensor(found))
        thresholds.append(torch.cat(scores).quantile(1 - share).item() - 1e-5)
    return ExitRule(signal, layers, thresholds, **more)


@torch.inference_mode()
def encoder_rules(model, name, tensors, signal="gate", share=0.35):
    """The same for the streams left once per sample."""
    scores: dict[str, dict[int, torch.Tensor]] = {}
    exits = attached(model)

    def record(stream, k, state, before):
        if k in exits.layers[stream]:
            scores.setdefault(stream, {})[k] = stream_scores(exits, signal, stream, k, state, before)

    encode(view(model), exits, tensors, {}, Stopwatch(torch.device("cpu"), False), record)
    return {
        stream: ExitRule(signal, tuple(at), [s.quantile(1 - share).item() for s in at.values()])
        for stream, at in scores.items()
    }


def mixed(model, name, tensors, signal="gate", share=0.35, decay=None, from_step=0, **fill: Any):
    """A policy under which rows and tokens leave every stream at many different layers."""
    decoder = decoder_rule(model, name, tensors, signal, share, decay=decay, from_step=from_step)
    encoders = encoder_rules(model, name, tensors, "similarity" if signal == "similarity" else "gate")
    return ExitPolicy(encoders | {"decoder": decoder}, **fill)


def random_depths(name, rows, seed=0):
    """Depths of ``STEPS`` tokens of each row, drawn from the exits and the last layer."""
    model = zoo.shared(name)
    choices = torch.tensor([*zoo.exit_layers(name)["decoder"], view(model).decoder.num_layers])
    draws = torch.randint(len(choices), (rows, STEPS), generator=torch.Generator().manual_seed(seed))
    return choices[draws].tolist()


def assert_same_row(together, row, single):
    """A row of a batch has the tokens and the exit depths that it has alone."""
    length = single.sequences.shape[1]
    assert together.sequences[row, :length].tolist() == single.sequences[0].tolist()
    for stream, depth in single.exit_depths.items():
        mine = together.exit_depths[stream][row]
        assert (mine[: length - 1] if stream == "decoder" else mine).tolist() == depth[0].tolist()
