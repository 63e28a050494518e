"""Every family's tiny random member through compile: parity passes, also at other sizes, and a profile is there.

DiT's is test_compile_tiny.py; drawing by prompts is tests/stages/test_sample_prompts.py.
"""

import json
from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from dit2deploy.artefacts.bundle import PARITY, PROFILE, Bundle
from dit2deploy.evaluate.fidelity import sqnr_db
from dit2deploy.models import FAMILIES
from dit2deploy.nn.at_hand import quantized
from dit2deploy.pipeline import compile
from dit2deploy.targets import by_name
from tests.packing import tiny_module

SLOW = ("pixart", "sd3")  # a minute each, and nearest to DiT; `make test PYTEST="-m slow"` runs them
# Attentions that ONNX Runtime's operator computes, and those that are left as they are: they have a mask.
ATTENTIONS = {"pixart": (1, 1), "sd3": (1, 0), "flux": (2, 0), "z-image": (1, 2), "wan": (2, 0)}
OTHERS = [
    pytest.param(family, marks=pytest.mark.slow if family.name in SLOW else (), id=family.name)
    for family in FAMILIES
    if family.name != "dit"
]


@pytest.mark.parametrize("family", OTHERS)
def test_a_tiny_member_is_compiled(family, tmp_path, memory_not_measured):
    module = tiny_module(family)
    module.save_pretrained(tmp_path / "model")
    bundle = compile(tmp_path / "model", tmp_path / "bundle", recipe="w1.58a4", samples=2, steps=2, runs=1)
    assert bundle.manifest.family == family.name and set(bundle.manifest.targets) == {"ort-cpu"}
    result = json.loads((bundle.folder / PARITY).read_text())
    checks = result["engine_against_quantized"]
    assert result["status"] == checks["layers"]["status"] == checks["steps"]["status"] == "passed"
    latency = json.loads((bundle.folder / PROFILE).read_text())["latency"]
    assert {row["name"] for row in latency} == {"engine", "ort-fp32", "torch-fp32"}

    graph = ir.load(bundle.path(bundle.target("ort-cpu").engines["onnx"])).graph
    found = Counter(node.op_type for node in graph)
    assert (found["MultiHeadAttention"], found["Softmax"]) == ATTENTIONS[family.name]

    inputs = family.inputs(module.config, batch=3, seed=4, second=True)
    feed = {name: value.numpy() for name, value in inputs.items()}
    engine = by_name("ort-cpu").open(Bundle.load(bundle.folder))
    got = engine.run(feed)[bundle.manifest.outputs[0].name]
    engine.close()
    want = quantized(bundle)(feed)
    assert np.isfinite(want).all() and sqnr_db(want, got) > 20


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", [family for family in FAMILIES if family.name != "dit"], ids=lambda family: family.name
)
def test_a_tiny_member_is_compiled_with_integer_attention(family, tmp_path, memory_not_measured):
    tiny_module(family).save_pretrained(tmp_path / "model")
    bundle = compile(tmp_path / "model", tmp_path / "bundle", recipe="tq-dit", samples=2, steps=2, runs=1)
    assert bundle.policy.attentions
    assert json.loads((bundle.folder / PARITY).read_text())["status"] == "passed"
