"""The small head beside the screened one and beside every score in float64; and which of them is taken."""

import numpy as np
import pytest

from lightning_mue.backbones import view
from lightning_mue.inference import session
from lightning_mue.inference.screened_head import ScreenedHead
from lightning_mue.inference.small_head import SmallHead
from tests import zoo

pytest.importorskip("onnxruntime")

V, D, R = 403, 48, 9


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def barred(rows, scores_RV):
    """Forbid each row its own tokens, and all rows the last ones."""
    scores_RV[np.arange(len(rows)), rows * 7] = -np.inf
    scores_RV[:, V // 2 :] = -np.inf
    return scores_RV


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("process", [None, barred])
def test_it_is_the_screened_head_and_the_best_of_all_scores(bias, process):
    weight_VD, h_RD = numbers(V, D), numbers(R, D, seed=1)
    weight_VD[200:209] = weight_VD[100:109] = h_RD  # ties: the lowest token
    bias_V = numbers(V, seed=2) if bias else None
    exact_RV = h_RD.astype(np.float64) @ weight_VD.T + (0 if bias_V is None else bias_V)
    exact_RV = exact_RV.astype(np.float32)
    expected = (exact_RV if process is None else process(np.arange(R), exact_RV)).argmax(1)
    for head in (SmallHead(weight_VD, bias_V), ScreenedHead(weight_VD, bias_V, 1)):
        assert head.argmax(h_RD, process).tolist() == expected.tolist()


def test_a_large_vocabulary_is_screened(monkeypatch):
    sessions = pytest.importorskip("lightning_mue.inference.sessions")
    decoder = view(zoo.shared("florence2")).decoder
    assert isinstance(sessions.decoder_sessions(decoder).greedy_head, SmallHead)
    monkeypatch.setattr(session, "MOST_WEIGHTS", 0)
    assert isinstance(sessions.decoder_sessions(decoder).greedy_head, ScreenedHead)
