"""Which quantizers and GEMMs of a graph exchange packed codes, and that they compute what they did."""

import numpy as np
import onnx_ir as ir
import pytest
import torch

from dit2deploy.formats import TERNARY, pack
from dit2deploy.ops import GEMMS, HADAMARD_QUANTIZE
from dit2deploy.targets import kernel
from dit2deploy.targets.graph import columns_of, is_gemm, pack_codes, packed_quantizers
from tests.plugins.gemms import in_fragments, on_host

# x -> a quantizer -> two GEMMs (of which the second's attributes are the case's) -> their outputs.
GRAPH = """<ir_version: 10, opset_import: ["" : 20, "dit2deploy" : 1]>
shared (float[B, 192] x, float[1] qmax, int32[N, W] w, float[40, {groups}] ws, float[40] bias) => ({outputs})
<int8[B, {columns}] q, float[B, 1] s> {{
  q, s = dit2deploy.HadamardQuantize <block: int = 64> (x, qmax)
  a = dit2deploy.TernaryGemm <bits: int = 4> (q, s, w, ws, bias)
  b = dit2deploy.{op} <bits: int = {bits}> (q, s, w, ws, bias)
}}"""
CASES = {
    "narrow": ({}, True),
    "another format": ({"op": "Int4GemmResidual"}, True),
    "groups of 64": ({"groups": 3}, True),
    "wide weights": ({"op": "Int8Gemm"}, False),
    "wide codes": ({"bits": 5}, False),
    "groups of 32": ({"groups": 6}, False),
    "columns that are no runs": ({"columns": 96}, False),
    "another op": ({"op": "QuantMatMul"}, False),
    "codes are an output": ({"outputs": "float[B, 40] a, float[B, 40] b, int8[B, 192] q"}, False),
}


@pytest.fixture(scope="module")
def gpu():
    """The emulated one."""
    return on_host(kernel.library_path())


@pytest.mark.parametrize("name", CASES)
def test_codes_are_packed_where_every_reader_takes_them(name: str):
    changes, wanted = CASES[name]
    outputs = "float[B, 40] a, float[B, 40] b"
    values = {"op": "TernaryGemm", "bits": 4, "groups": 1, "columns": 192, "outputs": outputs, **changes}
    model = ir.from_onnx_text(GRAPH.format(**values))
    pack_codes(model)
    assert packed_quantizers(model) == wanted
    q = model.graph[0].outputs[0]
    assert q.shape[-1] == (96 if wanted else values["columns"])
    assert all(("packed" in node.attributes) == wanted for node in model.graph)
    gemms = list(filter(is_gemm, model.graph))
    assert gemms and {columns_of(node) for node in gemms} == {values["columns"]}


def test_a_packed_graph_computes_the_same(gpu):
    """Node by node on the emulated GPU, with the attributes that the pass leaves."""
    model = ir.from_onnx_text(GRAPH.format(
        op="TernaryGemm", bits=4, groups=3, columns=192, outputs="float[B, 40] a, float[B, 40] b"
    ))  # fmt: skip
    pack_codes(model)
    rng = np.random.default_rng(0)
    x, qmax = rng.standard_normal((20, 192), np.float32), np.array([7], np.float32)
    weights = rng.integers(-1, 1, (40, 192), endpoint=True)
    ws, bias = abs(rng.standard_normal((40, 3), np.float32)), rng.standard_normal(40, np.float32)
    quantizer, gemm, _ = model.graph
    attributes = [{key: value.value for key, value in node.attributes.items()} for node in (quantizer, gemm)]
    q, s = kernel.run(quantizer.op_type, [x, qmax], attributes[0], [(20, 96), (20, 1)], isa="cuda_on_host", library=gpu)
    inputs = [q, s, in_fragments(TERNARY, weights, gpu), ws, bias]
    given = attributes[1] | {"layout": kernel.FRAGMENT_ORDER}
    (y,) = kernel.run(gemm.op_type, inputs, given, [(20, 40)], isa="cuda_on_host", library=gpu)

    codes, step = HADAMARD_QUANTIZE.call(torch.from_numpy(x), torch.from_numpy(qmax), block=64)
    rest = [torch.from_numpy(value) for value in (pack(weights, TERNARY), ws, bias)]
    want = GEMMS["ternary"].call(codes, step, *rest, bits=4).numpy()
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-5 * abs(want).max())
