"""Sessions: weights that lie beside their graph, and heads of a few tokens."""

import numpy as np
import pytest

from lightning_mue.inference.session import DecoderSessions, Session
from lightning_mue.inference.session_options import session_options

pytest.importorskip("onnxruntime")


def test_weights_lie_beside_their_graph():
    onnx = pytest.importorskip("onnx")
    from lightning_mue.inference.product_graph import make_external

    weight = np.arange(1200, dtype=np.float32).reshape(30, 40)
    tensor = onnx.numpy_helper.from_array(np.zeros_like(weight), "weight")
    make_external(tensor)
    info, kind = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    node = onnx.helper.make_node("Mul", ["x", "weight"], ["y"])
    graph = onnx.helper.make_graph([node], "g", [info("x", kind, [30, 40])], [info("y", kind, [30, 40])], [tensor])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    session = Session(model.SerializeToString(), 1, {"weight": weight})
    x = np.full((30, 40), 2, np.float32)
    assert np.array_equal(session(x)[0], 2 * weight)
    assert session.named({"x": x, "more": x})["y"].tolist() == (2 * weight).tolist()
    place = np.zeros((3, 30, 40), np.float32)
    session.into([x], [place[1]])
    assert np.array_equal(place[1], 2 * weight)
    assert not place[[0, 2]].any()


@pytest.mark.parametrize("bias", [None, np.arange(30, dtype=np.float32)])
def test_a_closed_head_scores_its_tokens_and_bars_all_others(bias):
    chance = np.random.default_rng(0)
    weight, h = (chance.standard_normal(shape).astype(np.float32) for shape in ((30, 8), (5, 8)))
    head = DecoderSessions([], 2, 8, 9, "float32", 1, weight, bias, lambda: pytest.fail("all were scored"))
    found, tokens = head.closed_head([3, 4, 17]), [3, 4, 17]
    expected = h @ weight.T + (0 if bias is None else bias)
    np.testing.assert_allclose(found(h)[:, tokens], expected[:, tokens], rtol=1e-5, atol=1e-5)
    assert np.isneginf(np.delete(found(h), tokens, axis=1)).all()


def test_sessions_do_not_spin():
    """Threads of one session that waited busily would take the processor from the next one."""
    options = session_options(3)
    assert options.intra_op_num_threads == 3
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
