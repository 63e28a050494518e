"""ONNX Runtime's own attention for the exported one: the same results, where it fires, where it must not."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from dit2deploy.targets.ort_attention import use_fused_attention
from tests.graphs import count

# As torch exports it: k is transposed as rank 3, because the batch is dynamic. 2 heads of 8.
PATTERN = """<ir_version: 10, opset_import: ["" : 20]>
pattern (float[B, 2, T, 8] q, float[B, 2, L, 8] k, float[B, 2, L, 8] v) => (float[B, T, 16] z OUTPUT)
<float c = {0.6}, int64[1] first = {-1}, int64[1] l = {7}, int64[1] d = {8},
 int64[4] tall = {-1, 2, 8, 7}, int64[3] merged = {-1, 5, 16}> {
  sizes = Concat <axis = 0> (first, l, d)
  three = Reshape (k, sizes)
  turned = Transpose <perm = [0, 2, 1]> (three)
  kt = Reshape (turned, tall)
  cq = Mul (q, c)
  ck = Mul (kt, c)
  scores = MatMul (cq, ck)
  weights = Softmax <axis = -1> (scores)
  mixed = MatMul (weights, v)
  tokens = Transpose <perm = [0, 2, 1, 3]> (mixed)
  y = Reshape (tokens, merged)
  z = Relu (y)
  MORE
}"""
STATIC = [  # as where the batch is known
    ("kt = Reshape (turned, tall)", "kt = Transpose <perm = [0, 1, 3, 2]> (k)"),
]


def pattern(*changes: tuple[str, str], output: str = "", more: str = "") -> ir.Model:
    text = PATTERN
    for old, new in (*changes, ("OUTPUT", output), ("MORE", more)):
        assert old in text
        text = text.replace(old, new)
    proto = onnx.parser.parse_model(text)
    proto.graph.value_info.append(onnx.helper.make_tensor_value_info("y", 1, ["B", 5, 16]))
    return ir.serde.deserialize_model(proto)


def run(model: ir.Model) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(ir.serde.serialize_model(model).SerializeToString())
    rng = np.random.default_rng(0)
    shapes = {"q": (3, 2, 5, 8), "k": (3, 2, 7, 8), "v": (3, 2, 7, 8)}
    return session.run(None, {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()})


@pytest.mark.parametrize(
    "changes",
    [
        [],
        STATIC,
        [("cq = Mul (q, c)", "cq = Mul (c, q)")],
        [("cq = Mul (q, c)", "cq = Identity (q)"), ("MatMul (cq", "MatMul (q")],
    ],
    ids=("dynamic", "static", "swapped", "scaled once"),
)
def test_the_model_computes_the_same_before_and_after(changes):
    before, after = pattern(*changes), pattern(*changes)
    use_fused_attention(after)
    found = count(after)
    assert found["MultiHeadAttention"] == 1 and not found["Softmax"] and not found["MatMul"]
    np.testing.assert_allclose(run(after)[0], run(before)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"output": ", float[B, 2, T, L] weights"},  # asked for
        {"output": ", float[B, 2, T, L] seen", "more": "seen = Relu (weights)"},
        {"changes": [("Softmax <axis = -1>", "Softmax <axis = 2>")]},
        {"changes": [("MatMul (weights, v)", "MatMul (v, weights)"), ("float[B, 2, L, 8] v", "float[B, 2, 5, 5] v")]},
        {
            "changes": [
                (
                    "weights = Softmax <axis = -1> (scores)",
                    "masked = Add (scores, c)\n  weights = Softmax <axis = -1> (masked)",
                )
            ]
        },
        {"changes": [("tokens = Transpose <perm = [0, 2, 1, 3]>", "tokens = Transpose <perm = [0, 1, 2, 3]>")]},
        {"changes": [("first = {-1}", "first = {6}")]},
        {"changes": [("float[B, 2, L, 8] v", "float[B, 2, L, 6] v")]},
        {"changes": [("float[B, 2, T, 8] q", "float[B, H, T, 8] q")]},
    ],
)
def test_what_is_not_the_pattern_is_left_alone(kwargs):
    model = pattern(*kwargs.pop("changes", ()), **kwargs)
    before = count(model)
    use_fused_attention(model)
    assert count(model) == before and before["Softmax"] == 1
