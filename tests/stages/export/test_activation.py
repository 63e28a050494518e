"""The fusion of activations: the same results before and after, where it fires, where it must not."""

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch.nn import functional

from dit2deploy.models import FAMILIES
from dit2deploy.ops.activation_hadamard_quantize import gelu, silu
from dit2deploy.stages.export.fuse.activation import fuse_activation
from dit2deploy.stages.export.passes import tidy
from tests.graphs import count, run

PATTERN = """<ir_version: 10, opset_import: ["" : 20, "dit2deploy" : 1]>
pattern (float[B, 5, 32] x, float[B, 5, 32] f, float[B, 1, 32] row)
    => (int8[B, 5, 32] q, float[B, 5, 1] s OUTPUT) <float[1] qmax = {7}> {
  ACTIVATION
  q, s = dit2deploy.HadamardQuantize <block = 32> (y, qmax)
  MORE
}"""
GELU = 'y = Gelu <approximate = "tanh"> (x)'
SILU = "gate = Sigmoid (x) y = Mul (x, gate)"
# What makes y, and the op that it becomes.
MADE = {
    "gelu": (GELU, "Activation", "gelu-tanh"),
    "silu": (SILU, "Activation", "silu"),
    "silu-turned": ("gate = Sigmoid (x) y = Mul (gate, x)", "Activation", "silu"),
    "swiglu": (SILU.replace("y =", "a =") + " y = Mul (a, f)", "GatedActivation", "silu"),
    "swiglu-turned": (SILU.replace("y =", "a =") + " y = Mul (f, a)", "GatedActivation", "silu"),
    "geglu": (GELU.replace("y =", "a =") + " y = Mul (a, f)", "GatedActivation", "gelu-tanh"),
}
# What makes y, and stays as it is.
LEFT = {
    "the exact form": "y = Gelu (x)",
    "another's sigmoid": "gate = Sigmoid (f) y = Mul (x, gate)",
    "a factor a sample": SILU.replace("y =", "a =") + " y = Mul (a, row)",
    "no activation": "y = Mul (x, f)",
}


def pattern(activation: str, *, output: str = "", more: str = "") -> ir.Model:
    text = PATTERN.replace("ACTIVATION", activation).replace("OUTPUT", output).replace("MORE", more)
    return ir.serde.deserialize_model(onnx.parser.parse_model(text))


@pytest.mark.parametrize("is_kept", (False, True))
@pytest.mark.parametrize("name", MADE)
def test_the_model_computes_the_same_before_and_after(name: str, is_kept: bool):
    text, op, activation = MADE[name]
    kwargs = {"output": ", float[B, 5, 32] z", "more": "z = Relu (y)"} if is_kept else {}
    before, after = (pattern(text, **kwargs) for _ in range(2))
    fuse_activation(after)
    tidy(after)
    assert count(after) == Counter([f"{op}HadamardQuantize{'Keep' * is_kept}", *(["Relu"] if is_kept else [])])
    fused = next(node for node in after.graph if node.domain)
    assert fused.attributes["activation"].as_string() == activation
    rng = np.random.default_rng(0)
    inputs = {name: 3 * rng.standard_normal((3, 5, 32)).astype(np.float32) for name in ("x", "f")}
    inputs["row"] = np.ones((3, 1, 32), np.float32)
    (q, s, *z), (q2, s2, *z2) = run(before, inputs), run(after, inputs)
    assert (q != q2).mean() < 0.01 and abs(q.astype(int) - q2).max() <= 1  # codes at ties
    np.testing.assert_allclose(s, s2, rtol=1e-5)
    for a, b in zip(z, z2, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("name", LEFT)
def test_other_forms_are_left_alone(name: str):
    model = pattern(LEFT[name])
    before = count(model)
    fuse_activation(model)
    assert count(model) == before


@pytest.mark.parametrize("activation", [GELU, SILU])
def test_a_second_quantizer_of_the_row_reads_what_is_kept(activation: str):
    more = "q2, s2 = dit2deploy.HadamardQuantize <block = 16> (y, qmax)"
    model = pattern(activation, output=", int8[B, 5, 32] q2", more=more)
    fuse_activation(model)
    tidy(model)
    assert count(model) == {"ActivationHadamardQuantizeKeep": 1, "HadamardQuantize": 1}


# Ops by activation, a kept row with "+"; and what is left: a GELU of FLUX's single blocks, whose row is joined with
# attention's before it is quantized, and SiLU before Z-Image's last modulation, which is not quantized. Embedders and
# modulations have no branch here; DiT's last layer, which is not quantized, reads the first block's SiLU too.
FIRED = {
    "dit": ({"silu": 3, "silu+": 1, "gelu-tanh+": 2}, {}),
    "pixart": ({"silu": 2, "gelu-tanh": 1, "gelu-tanh+": 1}, {}),
    "sd3": ({"silu": 2, "silu+": 1, "gelu-tanh+": 1}, {}),
    "flux": ({"silu": 3, "silu+": 1, "gelu-tanh+": 2}, {"Gelu": 1}),
    "z-image": ({"silu": 1, "gated silu+": 3}, {"Sigmoid": 1}),
    "wan": ({"silu": 2, "gelu-tanh": 1, "gelu-tanh+": 1}, {}),
}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_it_fires_in_each_family(family, exported):
    """That the file still computes what PyTorch does is tested in test_export.py."""
    graph = ir.load(exported(family.name, "fused").model.path).graph
    found = Counter(
        "gated " * node.op_type.startswith("Gated")
        + node.attributes["activation"].as_string()
        + "+" * node.op_type.endswith("Keep")
        for node in graph
        if "activation" in node.attributes
    )
    left = Counter(node.op_type for node in graph if node.op_type in ("Gelu", "Sigmoid"))
    assert (found, left) == FIRED[family.name]


@pytest.mark.parametrize("ours", [gelu, silu])
def test_activations_are_as_exact_as_pytorchs(ours):
    kwargs = {"approximate": "tanh"} if ours is gelu else {}
    torchs = getattr(functional, ours.__name__)
    x = torch.linspace(-9, 9, 100_001)
    exact = torchs(x.double(), **kwargs)
    off, theirs = ((y.double() - exact).abs() for y in (ours(x), torchs(x, **kwargs)))
    assert off.max() <= 1.5 * theirs.max()
    inside = x > -3  # further left, 1 + tanh cancels in PyTorch, and 2^z is off by 2e-7 z here
    assert (off / exact.abs())[inside & (x != 0)].max() < 1e-6


@pytest.mark.parametrize("ours", [gelu, silu])
def test_activations_have_limits(ours):
    x = torch.tensor([float("nan"), float("inf"), 1e30, -1e30, 0.0, -0.0])
    y = ours(x)
    assert torch.isnan(y[0]) and y[1] == float("inf") and y[2] == 1e30 and abs(y[3]) < 1e-7 and (y[4:] == 0).all()
