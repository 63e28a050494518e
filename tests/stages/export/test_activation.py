"""The GELU fusion: the same results before and after, where it fires, where it must not."""

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from dit2deploy.models import FAMILIES
from dit2deploy.ops.activation_hadamard_quantize import gelu
from dit2deploy.stages.export.bodies import add_bodies
from dit2deploy.stages.export.fuse.activation import fuse_activation
from dit2deploy.stages.export.passes import tidy

PATTERN = """<ir_version: 10, opset_import: ["" : 20, "dit2deploy" : 1]>
pattern (float[B, 5, 32] x) => (int8[B, 5, 32] q, float[B, 5, 1] s OUTPUT) <float[1] qmax = {7}> {
  y = Gelu <approximate = "tanh"> (x)
  q, s = dit2deploy.HadamardQuantize <block = 32> (y, qmax)
  MORE
}"""


def pattern(*, output: str = "", more: str = "", form: str = '"tanh"') -> ir.Model:
    text = PATTERN.replace("OUTPUT", output).replace("MORE", more).replace('"tanh"', form)
    return ir.serde.deserialize_model(onnx.parser.parse_model(text))


def count(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def run(model: ir.Model, x: np.ndarray) -> list[np.ndarray]:
    add_bodies(model)
    proto = ir.serde.serialize_model(model)
    onnx.checker.check_model(proto)
    return ReferenceEvaluator(proto).run(None, {"x": x})


@pytest.mark.parametrize("is_kept", (False, True))
def test_the_model_computes_the_same_before_and_after(is_kept: bool):
    kwargs = {"output": ", float[B, 5, 32] z", "more": "z = Relu (y)"} if is_kept else {}
    before, after = (pattern(**kwargs) for _ in range(2))
    fuse_activation(after)
    tidy(after)
    name = "ActivationHadamardQuantizeKeep" if is_kept else "ActivationHadamardQuantize"
    assert count(after) == Counter([name, *(["Relu"] if is_kept else [])])
    x = 3 * np.random.default_rng(0).standard_normal((3, 5, 32)).astype(np.float32)
    (q, s, *z), (q2, s2, *z2) = run(before, x), run(after, x)
    assert (q != q2).mean() < 0.01 and abs(q.astype(int) - q2).max() <= 1  # codes at ties
    np.testing.assert_allclose(s, s2, rtol=1e-5)
    for a, b in zip(z, z2, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_the_exact_form_is_left_alone():
    model = pattern(form='"none"')
    fuse_activation(model)
    assert count(model) == {"Gelu": 1, "HadamardQuantize": 1}


def test_a_second_quantizer_of_the_row_reads_what_is_kept():
    more = "q2, s2 = dit2deploy.HadamardQuantize <block = 16> (y, qmax)"
    model = pattern(output=", int8[B, 5, 32] q2", more=more)
    fuse_activation(model)
    tidy(model)
    assert count(model) == {"ActivationHadamardQuantizeKeep": 1, "HadamardQuantize": 1}


# GELUs left: of FLUX's single blocks, whose row is joined with attention's before it is quantized. Z-Image has none.
FIRED = {"dit": (2, 0), "pixart": (1, 0), "sd3": (1, 0), "flux": (2, 1), "z-image": (0, 0), "wan": (1, 0)}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_it_fires_in_each_family(family, exported):
    """That the file still computes what PyTorch does is tested in test_export.py."""
    model = onnx.load(exported(family.name, "fused").model.path, load_external_data=False)
    found = Counter(node.op_type for node in model.graph.node)
    assert (found["ActivationHadamardQuantizeKeep"], found["Gelu"]) == FIRED[family.name]


def test_gelu_is_as_exact_as_pytorchs():
    x = torch.linspace(-9, 9, 100_001)
    exact = torch.nn.functional.gelu(x.double(), approximate="tanh")
    off, theirs = ((y.double() - exact).abs() for y in (gelu(x), torch.nn.functional.gelu(x, approximate="tanh")))
    assert off.max() <= 1.5 * theirs.max()
    inside = x > -3  # further left, 1 + tanh cancels in PyTorch, and 2^z is off by 2e-7 z here
    assert (off / exact.abs())[inside & (x != 0)].max() < 1e-6


def test_gelu_has_limits():
    x = torch.tensor([float("nan"), float("inf"), 1e30, -1e30, 0.0, -0.0])
    y = gelu(x)
    assert torch.isnan(y[0]) and y[1] == float("inf") and y[2] == 1e30 and abs(y[3]) < 1e-7 and (y[4:] == 0).all()
