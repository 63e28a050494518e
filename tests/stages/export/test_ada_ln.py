"""The AdaLN fusion: the same results before and after, where it fires, where it must not."""

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from dit2deploy.models import FAMILIES
from dit2deploy.ops import HADAMARD_QUANTIZE
from dit2deploy.stages.export.fuse.ada_ln import _constant, fuse_ada_ln
from dit2deploy.stages.export.passes import tidy
from tests.graphs import count, run

PATTERN = """<ir_version: 10, opset_import: ["" : 20, "dit2deploy" : 1]>
pattern (float[B, 5, 32] x, float[B, ROWS, 32] shift, float[B, ROWS, 32] scale)
  => (int8[B, 5, 32] q, float[B, 5, 1] s OUTPUT)
  <float[32] ones = {ONES}, float[1] one = {1}, float[1] qmax = {7}> {
  normal = LayerNormalization <axis = -1, epsilon = 0.001> (x, ones)
  gain = Add (one, scale)
  scaled = Mul (normal, gain)
  y = Add (scaled, shift)
  q, s = dit2deploy.HadamardQuantize <block = 32> (y, qmax)
  MORE
}"""


def pattern(*, output: str = "", more: str = "", ones: str = "1", rows: str = "1", changes=()) -> ir.Model:
    """The pattern with known shapes; `changes` are pairs of texts."""
    text = PATTERN.replace("ONES", ", ".join([ones] * 32)).replace("ROWS", rows)
    text = text.replace("OUTPUT", output).replace("MORE", more)
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    proto = onnx.parser.parse_model(text)
    for name in ("normal", "scaled", "y"):
        proto.graph.value_info.append(onnx.helper.make_tensor_value_info(name, 1, ["B", 5, 32]))
    for name in ("shift", "scale", "gain"):
        proto.graph.value_info.append(onnx.helper.make_tensor_value_info(name, 1, ["B", int(rows), 32]))
    return ir.serde.deserialize_model(proto)


@pytest.mark.parametrize("is_kept", (False, True))
@pytest.mark.parametrize(
    "changes",
    [
        (),
        (("Add (one, scale)", "Add (scale, one)"),),
        (("Mul (normal, gain)", "Mul (gain, normal)"), ("Add (scaled, shift)", "Add (shift, scaled)")),
    ],
)
def test_the_model_computes_the_same_before_and_after(is_kept: bool, changes):
    kwargs = {"output": ", float[B, 5, 32] z", "more": "z = Relu (y)"} if is_kept else {}
    before, after = (pattern(changes=changes, **kwargs) for _ in range(2))
    fuse_ada_ln(after)
    tidy(after)
    name = "AdaLnHadamardQuantizeKeep" if is_kept else "AdaLnHadamardQuantize"
    assert count(after) == Counter([name, *(["Relu"] if is_kept else [])])
    rng = np.random.default_rng(0)
    feed = {"x": rng.standard_normal((3, 5, 32)) * 3 + 1}
    feed |= {name: rng.standard_normal((3, 1, 32)) for name in ("shift", "scale")}
    feed = {name: value.astype(np.float32) for name, value in feed.items()}
    (q, s, *z), (q2, s2, *z2) = run(before, feed), run(after, feed)
    assert (q != q2).mean() < 0.01 and abs(q.astype(int) - q2).max() <= 1  # codes at ties
    np.testing.assert_allclose(s, s2, rtol=1e-5)
    for a, b in zip(z, z2, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"ones": "2"},  # a norm with weights of its own
        {"rows": "5"},  # a row a token
        {"changes": [("one = {1}", "one = {2}")]},
        {"changes": [("scaled = Mul", "scaled = Div")]},
        {"changes": [("axis = -1", "axis = 1")]},
        {"output": ", float[B, 5, 32] z", "more": "z = Relu (normal)"},  # read before the modulation
        {"output": ", float[B, 5, 32] z", "more": "z = Relu (scaled)"},
        {"output": ", float[B, 5, 32] scaled"},
    ],
)
def test_what_is_not_the_pattern_is_left_alone(kwargs):
    model = pattern(**kwargs)
    before = count(model)
    fuse_ada_ln(model)
    assert count(model) == before and before[HADAMARD_QUANTIZE.name] == 1


def test_epsilons_that_are_alike_stay_apart():
    model = pattern()
    names = [_constant(model.graph, number).name for number in (1e-6, 1.2e-6)]
    held = [float(model.graph.initializers[name].const_value.numpy()[0]) for name in names]
    assert held == [pytest.approx(1e-6), pytest.approx(1.2e-6)]


def test_a_second_quantizer_of_the_row_reads_what_is_kept():
    more = "q2, s2 = dit2deploy.HadamardQuantize <block = 32> (y, one)"
    model = pattern(output=", int8[B, 5, 32] q2", more=more)
    fuse_ada_ln(model)
    tidy(model)
    assert count(model) == {"AdaLnHadamardQuantizeKeep": 1, "HadamardQuantize": 1}


# Norms left: of the last layer, which stays float; SD3.5's that two modulations read; Wan's with weights of its own.
FIRED = {
    "dit": (4, 1),
    "pixart": (2, 1),
    "sd3": (2, 2),
    "flux": (5, 1),
    "wan": (2, 2),
    "z-image": (0, 1),
}  # Z-Image: RMSNorm


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_it_fires_in_each_family(family, exported):
    """That the file still computes what PyTorch does is tested in test_export.py."""
    model = onnx.load(exported(family.name, "fused").model.path, load_external_data=False)
    found = Counter(node.op_type for node in model.graph.node)
    assert (found["AdaLnHadamardQuantizeKeep"], found["LayerNormalization"]) == FIRED[family.name]
    functions = {function.name for function in model.functions}
    assert ("AdaLnHadamardQuantizeKeep" in functions) == (FIRED[family.name][0] > 0)
