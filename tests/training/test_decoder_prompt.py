"""Training where the decoder is given a prompt: answers follow it, and it is never left early."""

from functools import partial

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from lightning_mue.backbones import view
from lightning_mue.exits import attached
from lightning_mue.training import objective as objective_file
from lightning_mue.training.depths import Step
from lightning_mue.training.gates import decoder_gate_logits, own_path
from lightning_mue.training.supervised import supervise
from lightning_mue.training.supervision import Supervision
from tests import reference, zoo
from tests.invariants.test_decoder_prompt import BACKBONES, LENGTHS, ROWS, alone, prompted, recorded


@pytest.mark.parametrize("name", BACKBONES)
def test_training_teaches_the_answer_after_the_prompt(name):
    model, tensors = zoo.make(name), prompted(name)
    labels = torch.randint(5, zoo.VOCABULARY, (ROWS, 3), generator=torch.Generator().manual_seed(3))
    labels[1, 2] = labels[3, 1:] = -100
    found = supervise(view(model), attached(model), tensors, labels, {})
    losses, tokens = {k: [] for k in found.results}, {k: [] for k in found.results}
    for row in range(ROWS):
        one, given = alone(tensors, row)
        del one["decoder_prompt"]
        answer = labels[row][labels[row] >= 0]
        states, logits = reference.decoder_states(model, one, torch.cat([given, answer[None, :-1]], 1))
        for k in found.results:
            at = logits if k == view(model).decoder.num_layers else reference.exit_logits(model, k, states[k])
            losses[k].append(cross_entropy(at[0, LENGTHS[row] :], answer, reduction="none"))
            tokens[k] += at[0, LENGTHS[row] :].argmax(-1).tolist()
    for k, result in found.results.items():
        torch.testing.assert_close(result.loss, torch.cat(losses[k]).mean(), rtol=1e-4, atol=1e-4)
        assert result.tokens_N.tolist() == tokens[k]


@pytest.mark.parametrize("name", BACKBONES)
def test_gates_learn_along_the_models_own_answer(name):
    """On its own path every exit's state, and so every gate's logit, is the engine's."""
    model, tensors = zoo.make(name), prompted(name)
    found, trace = own_path(view(model), attached(model), tensors), recorded(name)
    logits = decoder_gate_logits(view(model), attached(model), found)
    taken = np.arange(trace.streams["decoder"].agree.shape[1]) < trace.lengths[:, None]
    for e, k in enumerate(zoo.exit_layers(name)["decoder"]):
        expected = torch.from_numpy(trace.streams["decoder"].scores["gate"][taken][:, e])
        torch.testing.assert_close(logits[k].detach().sigmoid(), expected, rtol=1e-4, atol=1e-4)
        assert found.agrees(k).tolist() == trace.streams["decoder"].agree[taken][:, e].tolist()


def test_propagated_states_leave_the_prompt_alone(monkeypatch):
    """Answers of one token have nothing to copy: at every depth their loss is the plain one, whatever the prompts."""
    model, tensors = zoo.make("florence2"), prompted("florence2")
    labels = torch.randint(5, zoo.VOCABULARY, (ROWS, 1), generator=torch.Generator().manual_seed(3))
    how = Supervision(propagate=1.0, weighting="sum", gate_weight=0.0)
    exact = supervise(view(model), attached(model), tensors, labels, {}).results
    for k, result in exact.items():
        depth = partial(lambda k, _layers, shape, _seed: torch.full(shape, k), k)
        monkeypatch.setattr(objective_file, "sample_token_depths", depth)
        found = objective_file.objective(view(model), attached(model), tensors, labels, Step(token_seed=0), how).total
        torch.testing.assert_close(found, len(exact) * result.loss, rtol=1e-4, atol=1e-4)
