"""A small graph of our ops, exported by hand: what every target's test builds."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from dit2deploy.artefacts import schema
from dit2deploy.artefacts.bundle import Bundle, BundleManifest, SizeRecord
from dit2deploy.artefacts.onnx_model import (
    CONFIG,
    DATA,
    MANIFEST,
    MODEL,
    LayerRecord,
    OnnxManifest,
    OnnxModel,
    PortRecord,
)
from dit2deploy.base.files import sha256_of_file, write_json
from dit2deploy.formats import INT8, TERNARY, pack
from dit2deploy.ops import DOMAIN, GEMMS, HADAMARD_QUANTIZE, LOW_RANK_GEMMS, OPSET, VERSION
from dit2deploy.targets import Target

K, N, RANK = 48, 40, 4


@dataclass(frozen=True)
class Sample:
    """An ONNX model, inputs of batch 3, and what PyTorch computes from them."""

    onnx: OnnxModel
    inputs: dict[str, np.ndarray]
    first: np.ndarray
    output: np.ndarray

    def bundle(self, target: Target, root: Path, **options) -> Bundle:
        """A bundle of this target alone, as stage build writes it."""
        root.mkdir()
        record = target.build(self.onnx, root=root, options=options)
        write_json(root / CONFIG, self.onnx.config)
        manifest = BundleManifest(
            model="Sample",
            family="sample",
            created="2026-01-01T00:00:00+00:00",
            inputs=self.onnx.manifest.inputs,
            outputs=self.onnx.manifest.outputs,
            layers=self.onnx.manifest.layers,
            targets={target.name: record},
            size=SizeRecord(float32=1, parts={}),
            provenance={},
            sha256={str(p.relative_to(root)): sha256_of_file(p) for p in root.rglob("*") if p.is_file()},
        )
        schema.save(manifest, root / "manifest.json")
        return Bundle.load(root)


@pytest.fixture(scope="session")
def sample(tmp_path_factory) -> Sample:
    """x [B, 5, 48] -> HadamardQuantize -> TernaryGemmLowRank -> HadamardQuantize -> Int8Gemm -> y [B, 5, 48]."""
    folder = tmp_path_factory.mktemp("onnx")
    rng = np.random.default_rng(0)
    floats = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    weights = {
        "a.qmax": np.array([7], np.float32),
        "a.weight": pack(rng.integers(-1, 1, (N, K), endpoint=True), TERNARY),
        "a.weight_scale": abs(floats(N, 1)),
        "a.bias": floats(N),
        "a.down_t": floats(K, RANK),
        "a.up": floats(N, RANK),
        "b.qmax": np.array([127], np.float32),
        "b.weight": pack(rng.integers(-127, 127, (K, N), endpoint=True), INT8),
        "b.weight_scale": abs(floats(K, 1)),
        "b.bias": floats(K),
    }

    def node(op, inputs, outputs, **attributes):
        values = op.node_attributes(attributes)
        return helper.make_node(op.name, inputs, outputs, name="_".join(outputs), domain=DOMAIN, **values)

    ternary, int8 = LOW_RANK_GEMMS["ternary"], GEMMS["int8"]
    nodes = [
        node(HADAMARD_QUANTIZE, ["x", "a.qmax"], ["a.q", "a.s"], block=16, clip="gaussian", grid="mid-rise"),
        helper.make_node("MatMul", ["x", "a.down_t"], ["a.t"]),
        node(ternary, ["a.q", "a.s", "a.weight", "a.weight_scale", "a.bias", "a.t", "a.up"], ["a.y"], bits=4),
        node(HADAMARD_QUANTIZE, ["a.y", "b.qmax"], ["b.q", "b.s"], block=8, clip="absmax"),
        node(int8, ["b.q", "b.s", "b.weight", "b.weight_scale", "b.bias"], ["y"], bits=8),
    ]
    shapes = {"a.q": (TensorProto.INT8, K), "a.s": (1, 1), "a.t": (1, RANK), "a.y": (1, N)}
    shapes |= {"b.q": (TensorProto.INT8, N), "b.s": (1, 1)}
    info = lambda name, dtype, last: helper.make_tensor_value_info(name, dtype, ["batch", 5, last])  # noqa: E731
    graph = helper.make_graph(
        nodes,
        "sample",
        [info("x", TensorProto.FLOAT, K)],
        [info("y", TensorProto.FLOAT, K)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
        value_info=[info(name, dtype, last) for name, (dtype, last) in shapes.items()],
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)],
        functions=[HADAMARD_QUANTIZE.function(), ternary.function(), int8.function()],
        ir_version=10,
    )
    onnx.save(model, folder / MODEL, save_as_external_data=True, location=DATA, size_threshold=0)
    write_json(folder / CONFIG, {"_class_name": "Sample"})
    manifest = OnnxManifest(
        form="fused",
        model="Sample",
        family="sample",
        checkpoint="",
        checkpoint_sha256="",
        inputs=(PortRecord(name="x", dtype="float32", shape=("batch", 5, K)),),
        outputs=(PortRecord(name="y", dtype="float32", shape=("batch", 5, K)),),
        layers={"a": LayerRecord(output="a.y", begin=0, end=N), "b": LayerRecord(output="y", begin=0, end=K)},
        opset=OPSET,
        custom_opset=VERSION,
    )
    schema.save(manifest, folder / MANIFEST)

    x = floats(3, 5, K)
    w = {name: torch.from_numpy(value) for name, value in weights.items()}
    tx = torch.from_numpy(x)
    q, s = HADAMARD_QUANTIZE.call(tx, w["a.qmax"], block=16, clip="gaussian", grid="mid-rise")
    a = [w[f"a.{name}"] for name in ("weight", "weight_scale", "bias")]
    first = ternary.call(q, s, *a, tx @ w["a.down_t"], w["a.up"], bits=4)
    q, s = HADAMARD_QUANTIZE.call(first, w["b.qmax"], block=8, clip="absmax")
    output = int8.call(q, s, *(w[f"b.{name}"] for name in ("weight", "weight_scale", "bias")), bits=8)
    return Sample(OnnxModel.load(folder), {"x": x}, first.numpy(), output.numpy())
