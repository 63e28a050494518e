"""The fusion of gate and residual: the same results before and after, where it fires, where it must not."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from dit2deploy.formats import TERNARY, pack
from dit2deploy.models import FAMILIES
from dit2deploy.stages.export.bodies import add_bodies
from dit2deploy.stages.export.fuse.residual import fuse_residual
from dit2deploy.stages.export.passes import tidy
from dit2deploy.stages.profile.ops import layers_of_nodes
from dit2deploy.targets.graph import add_outputs, is_gemm
from tests.graphs import count, run

PATTERN = """<ir_version: 10, opset_import: ["" : 20, "dit2deploy" : 1]>
pattern (int8[B, 5, 32] q, float[B, 5, 1] s, float[B, 5, 8] residual, float[B, ROWS, 8] gate, float[B, 5, 3] t,
         int32[8, 2] w, float[8, 1] ws, float[8] bias, float[8, 3] up) => (float[B, 5, 8] z OUTPUT) {
  layer = dit2deploy.TernaryGemm <bits = 4> (q, s, w, ws, bias)
  gated = Mul (gate, layer)
  joined = Add (residual, gated)
  z = Relu (joined)
  MORE
}"""


def pattern(*, output: str = "", more: str = "", rows: str = "1", low_rank: bool = False, changes=()) -> ir.Model:
    """The pattern with known shapes; `changes` are pairs of texts."""
    text = PATTERN.replace("ROWS", rows).replace("OUTPUT", output).replace("MORE", more)
    if low_rank:
        text = text.replace("TernaryGemm", "TernaryGemmLowRank").replace("bias)\n  gated", "bias, t, up)\n  gated")
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    proto = onnx.parser.parse_model(text)
    for name in ("layer", "gated", "joined"):
        proto.graph.value_info.append(onnx.helper.make_tensor_value_info(name, 1, ["B", 5, 8]))
    return ir.serde.deserialize_model(proto)


def feed() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"s": (3, 5, 1), "residual": (3, 5, 8), "gate": (3, 1, 8), "t": (3, 5, 3)}
    shapes |= {"ws": (8, 1), "bias": (8,), "up": (8, 3)}
    made = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return made | {
        "q": rng.integers(-7, 8, (3, 5, 32)).astype(np.int8),
        "w": pack(rng.integers(-1, 2, (8, 32)), TERNARY),
    }


@pytest.mark.parametrize("low_rank", (False, True))
@pytest.mark.parametrize(
    "changes",
    [(), (("Mul (gate, layer)", "Mul (layer, gate)"),), (("Add (residual, gated)", "Add (gated, residual)"),)],
)
def test_the_model_computes_the_same_before_and_after(low_rank: bool, changes):
    before, after = (pattern(low_rank=low_rank, changes=changes) for _ in range(2))
    fuse_residual(after)
    tidy(after)
    assert count(after) == {f"TernaryGemm{'LowRank' if low_rank else ''}Residual": 1, "Relu": 1}
    np.testing.assert_array_equal(*(run(model, feed())[0] for model in (before, after)))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"rows": "5"},  # a gate a token
        {"output": ", float[B, 5, 8] y", "more": "y = Relu (layer)"},  # read beside the gate
        {"output": ", float[B, 5, 8] y", "more": "y = Relu (gated)"},
        {"output": ", float[B, 5, 8] layer"},
        {"changes": [("joined = Add", "joined = Sub")]},
        {"changes": [("gated = Mul", "gated = Div")]},
        {"changes": [("float[B, 5, 8] residual", "float[B, 1, 8] residual")]},
        {"changes": [("(residual, gated)", "(bias, gated)")]},
        {"changes": [("(gate, layer)", "(bias, layer)")]},
        {"changes": [("z = Relu (joined)", ""), ("float[B, 5, 8] z", "float[B, 5, 8] joined")]},
    ],
)
def test_what_is_not_the_pattern_is_left_alone(kwargs):
    model = pattern(**kwargs)
    before = count(model)
    fuse_residual(model)
    assert count(model) == before and before["TernaryGemm"] == 1


def test_joined_layers_are_left_alone():
    """q, k and v are parts of one GEMM's output."""
    more = "sizes = Constant <value_ints = [4, 4]> ()\n  k, v = Split <axis = -1> (layer, sizes)"
    changes = [("float[B, 1, 8] gate", "float[B, 1, 4] gate"), ("float[B, 5, 8] residual", "float[B, 5, 4] residual")]
    changes += [("float[B, 5, 8] z", "float[B, 5, 4] z")]
    changes += [("gated = Mul (gate, layer)", f"{more}\n  gated = Mul (gate, k)")]
    model = pattern(output=", float[B, 5, 4] v", changes=changes)
    for value in (value for node in model.graph for value in node.outputs if value.name in ("k", "gated", "joined")):
        value.dtype, value.shape = ir.DataType.FLOAT, ir.Shape(["B", 5, 4])
    before = count(model)
    fuse_residual(model)
    assert count(model) == before


@pytest.mark.parametrize("low_rank", (False, True))
def test_the_layers_own_output_can_still_be_asked_for(low_rank: bool):
    """By parity: the values before gate and residual, beside the engine as it is."""
    plain = pattern(output=", float[B, 5, 8] layer", low_rank=low_rank)
    fused = pattern(low_rank=low_rank)
    fuse_residual(fused)
    tidy(fused)
    add_bodies(fused)
    add_outputs(fused, ["layer"])
    assert [node.op_type for node in fused.graph if is_gemm(node)] == [
        f"TernaryGemm{'LowRank' if low_rank else ''}{more}" for more in ("Residual", "")
    ]
    for got, want in zip(run(fused, feed()), run(plain, feed()), strict=True):
        np.testing.assert_array_equal(got, want)


# Of attentions and MLPs: two blocks of DiT, one of the others; SD3.5's last block has no text any more, FLUX's has two
# streams and a single block follows. PixArt's and Wan's cross-attention has no gate; Z-Image normalizes before it.
FIRED = {"dit": 4, "pixart": 2, "sd3": 2, "flux": 5, "wan": 2, "z-image": 0}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_it_fires_in_each_family(family, exported):
    """That the file still computes what PyTorch does is tested in test_export.py."""
    path: Path = exported(family.name, "fused").model.path
    model = ir.load(path)
    found = [node for node in model.graph if is_gemm(node) and node.op_type.endswith("Residual")]
    assert len(found) == FIRED[family.name]
    bundle = exported(family.name, "fused").model
    named = layers_of_nodes(path, bundle)  # reads its layers alone
    assert {named[node.name] for node in found} < set(bundle.manifest.layers)
    add_outputs(model, [record.output for record in bundle.manifest.layers.values()])  # none is missing
