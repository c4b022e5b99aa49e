"""Exit depths are what the rule says of scores computed from the backbone's own states, outside the engine.

Shapes: ``B`` rows, ``T`` steps, ``E`` exits, ``V`` vocabulary.
"""

import math

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy

from lightning_mue.backbones import view
from lightning_mue.inference.encode import encode
from lightning_mue.inference.stopwatch import Stopwatch
from lightning_mue.policy import ExitPolicy, ExitRule
from tests import reference, zoo
from tests.invariants.policies import CLOSED, STEPS, decoder_rule, generate

BACKBONES = list(zoo.BACKBONES)
TIMES = {
    "plain": {},
    "decay": {"decay": (0.7, 3.0)},
    "from_step": {"from_step": 4},
    "both": {"decay": (0.9, 1.0), "from_step": 2},
}


def exit_states(model, name, tensors, out):
    """Return the states after each exit and before it, ``[B, T, E, D]``, along the tokens of ``out``."""
    states, _ = reference.decoder_states(model, tensors, out.sequences[:, :-1])
    layers = zoo.exit_layers(name)["decoder"]
    return torch.stack([states[k] for k in layers], 2), torch.stack([states[k - 1] for k in layers], 2)


def exit_logits(model, name, h_BTED):
    layers = zoo.exit_layers(name)["decoder"]
    found = [reference.exit_logits(model, k, h_BTED[:, :, e]) for e, k in enumerate(layers)]
    return reference.suppressed(model, torch.stack(found, 2)).numpy()


def scores(model, name, signal, h_BTED, before_BTED):
    if signal == "similarity":
        h, before = h_BTED.double(), before_BTED.double()
        return ((h * before).sum(-1) / (h.norm(dim=-1) * before.norm(dim=-1))).numpy()
    p_BTEV = softmax(exit_logits(model, name, h_BTED).astype(np.float64), axis=-1)
    assert not np.isnan(p_BTEV).any()
    if signal == "entropy":
        return 1 - entropy(p_BTEV, axis=-1) / math.log(zoo.VOCABULARY)
    p_BTEV.sort(axis=-1)
    return p_BTEV[..., -1] - (p_BTEV[..., -2] if signal == "margin" else 0)


def first_exit(name, model, leaves):
    layers = [*zoo.exit_layers(name)["decoder"], view(model).decoder.num_layers]
    return layers[[*leaves, True].index(True)]


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize(
    ("signal", "times"),
    [("similarity", "plain"), ("margin", "plain"), ("entropy", "plain"), *(("confidence", t) for t in TIMES)],
)
def test_a_token_leaves_at_the_first_exit_whose_score_reaches_the_threshold(name, signal, times):
    model, tensors, times = zoo.shared(name), zoo.inputs(name, 4), TIMES[times]
    rule = decoder_rule(model, name, tensors, signal, **times)
    out, _ = generate(model, ExitPolicy({"decoder": rule}), tensors)
    score_BTE = scores(model, name, signal, *exit_states(model, name, tensors, out))
    depths = out.exit_depths["decoder"]
    for row, t in depths.nonzero().tolist():
        thresholds = np.array(rule.thresholds)
        if "decay" in times:
            beta, tau = times["decay"]
            thresholds = beta * thresholds + (1 - beta) * math.exp(-tau * t / STEPS)
        assert np.abs(score_BTE[row, t] - thresholds).min() > 1e-6, "too close to call"
        leaves = (score_BTE[row, t] >= thresholds) & (t >= times.get("from_step", 0))
        assert depths[row, t] == first_exit(name, model, leaves)
    assert len(depths[depths > 0].unique()) > 1, "the test policy does not mix depths"


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("patience", [1, 2, 3])
def test_patience_counts_exits_that_agree(name, patience):
    model, tensors = zoo.shared(name), zoo.inputs(name, 4)
    layers = zoo.exit_layers(name)["decoder"]
    out, _ = generate(model, ExitPolicy({"decoder": ExitRule("patience", layers, [patience] * len(layers))}), tensors)
    h_BTED, _ = exit_states(model, name, tensors, out)
    choice_BTE = exit_logits(model, name, h_BTED)[..., CLOSED].argmax(-1)
    depths = out.exit_depths["decoder"]
    for row, t in depths.nonzero().tolist():
        choices = choice_BTE[row, t].tolist()
        leaves = [e + 1 >= patience and len(set(choices[e + 1 - patience : e + 1])) == 1 for e in range(len(layers))]
        assert depths[row, t] == first_exit(name, model, leaves)
    assert patience != 2 or len(depths[depths > 0].unique()) > 1, "the test policy does not mix depths"


@pytest.mark.parametrize("name", BACKBONES)
def test_flat_similarity_is_one_decision_for_the_whole_batch(name):
    model, tensors = zoo.shared(name), zoo.inputs(name, 4)
    policy = ExitPolicy({"decoder": decoder_rule(model, name, tensors, "flat_similarity")})
    out, _ = generate(model, policy, tensors)
    h_BTED, before_BTED = exit_states(model, name, tensors, out)
    depths = out.exit_depths["decoder"]
    for t in range(depths.shape[1]):
        live = depths[:, t] > 0
        h, before = (s[live, t].double().transpose(0, 1).flatten(1) for s in (h_BTED, before_BTED))
        cosine_E = ((h * before).sum(1) / (h.norm(dim=1) * before.norm(dim=1))).numpy()
        leaves = cosine_E >= np.array(policy.rules["decoder"].thresholds)
        assert set(depths[live, t].tolist()) == {first_exit(name, model, leaves)}
    assert len(depths[depths > 0].unique()) > 1, "the test policy does not mix depths"
    alone = [generate(model, policy, {k: v[i : i + 1] for k, v in tensors.items()})[0] for i in range(4)]
    assert any(
        one.exit_depths["decoder"][0].tolist() != depths[i, : one.exit_depths["decoder"].shape[1]].tolist()
        for i, one in enumerate(alone)
    ), "who else is in the batch does not matter"


@pytest.mark.parametrize("name", BACKBONES)
def test_flat_similarity_of_streams_left_once_counts_padding(name):
    model, tensors = zoo.shared(name), zoo.inputs(name, 4)
    cosines = {}

    def record(stream, k, state, before_BTD):
        h, before = state.h_BTD.double().flatten(), before_BTD.double().flatten()
        cosines[stream, k] = float(h @ before / (h.norm() * before.norm()))

    backbone = view(model)
    with torch.inference_mode():
        encode(backbone, None, tensors, {}, Stopwatch(torch.device("cpu"), False), record)
    for stream in (s.name for s in backbone.encoders):
        low, high = zoo.exit_layers(name)[stream][:2]
        for margin, depth in ((-1e-4, low), (1e-4, high)):
            thresholds = [cosines[stream, low] + margin, cosines[stream, high] - 1e-4]
            rule = ExitRule("flat_similarity", (low, high), thresholds)
            out, _ = generate(model, ExitPolicy({stream: rule}), tensors)
            assert out.exit_depths[stream].tolist() == [depth] * 4
