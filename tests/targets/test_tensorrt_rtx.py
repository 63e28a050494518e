"""TensorRT-RTX engines: what is in them, and what is said where they cannot be built, read or opened."""

import os
import re
import resource
import sys

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from dit2deploy.artefacts.onnx_model import DATA, MODEL, OnnxModel, PortRecord
from dit2deploy.base.errors import Failed, Misuse
from dit2deploy.formats import TERNARY, pack
from dit2deploy.ops import DOMAIN, GEMMS, HADAMARD_QUANTIZE, OPSET, VERSION
from dit2deploy.targets import kernel, tensorrt, tensorrt_rtx, trt_build
from dit2deploy.targets.float_types import use_half_products
from dit2deploy.targets.graph import save_streamed
from dit2deploy.targets.ort import open_session
from dit2deploy.targets.trt_engine import inspect_engine

N = K = 512
ABLE = tensorrt_rtx.availability()
builds = pytest.mark.skipif(not ABLE.can_build, reason=f"tensorrt-rtx: {ABLE.reason}")


@pytest.fixture(scope="module")
def product(sample, tmp_path_factory) -> OnnxModel:
    """x [B, 64, 512] -> HadamardQuantize -> TernaryGemm -> y [B, 64, 512]; nothing but plugins."""
    folder = tmp_path_factory.mktemp("product")
    rng = np.random.default_rng(0)
    weights = {
        "qmax": np.array([7], np.float32),
        "w": pack(rng.integers(-1, 1, (N, K), endpoint=True), TERNARY),
        "ws": abs(rng.standard_normal((N, 1))).astype(np.float32),
        "bias": rng.standard_normal(N).astype(np.float32),
    }

    def node(op, inputs, outputs, **attributes):
        return helper.make_node(op.name, inputs, outputs, outputs[0], domain=DOMAIN, **op.node_attributes(attributes))

    nodes = [
        node(HADAMARD_QUANTIZE, ["x", "qmax"], ["q", "s"], block=128),
        node(GEMMS["ternary"], ["q", "s", "w", "ws", "bias"], ["y"], bits=4),
    ]
    info = lambda name, dtype, last: helper.make_tensor_value_info(name, dtype, ["batch", 64, last])  # noqa: E731
    graph = helper.make_graph(
        nodes,
        "product",
        [info("x", TensorProto.FLOAT, K)],
        [info("y", TensorProto.FLOAT, N)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
        value_info=[info("q", TensorProto.INT8, K), info("s", TensorProto.FLOAT, 1)],
    )
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    functions = [HADAMARD_QUANTIZE.function(), GEMMS["ternary"].function()]
    model = helper.make_model(graph, opset_imports=imports, functions=functions, ir_version=10)
    onnx.save(model, folder / MODEL, save_as_external_data=True, location=DATA, size_threshold=0)
    ports = {"x": K, "y": N}
    records = {name: (PortRecord(name=name, dtype="float32", shape=("batch", 64, n)),) for name, n in ports.items()}
    manifest = sample.onnx.manifest.model_copy(update={"inputs": records["x"], "outputs": records["y"]})
    return OnnxModel(folder, manifest)


def build(model: OnnxModel, root, *capabilities: str):
    return tensorrt_rtx.build(model, root=root, options={"compute_capabilities": capabilities or ("8.6",)})


@builds
def test_an_engine_is_its_packed_weights_and_little_else(product, tmp_path):
    record = build(product, tmp_path)
    assert record.engines == {"sm86": "tensorrt-rtx/sm86.engine"}
    told = record.details["engines"]["sm86"]
    packed = N * K // 16 * 4  # 16 trits a word of the kernels' layout: 2 bits each
    assert told["plugin_layers"] == 2 and told["engine_plugins"] == {"HadamardQuantize": 1, "TernaryGemm": 1}
    assert (told["packed_weights"], told["packed_weights_found_once"]) == (1, 1)
    assert told["packed_weight_bytes"] <= packed
    assert 0 < told["other_bytes"] < 30_000
    assert record.weight_bytes == told["bytes"] == (tmp_path / record.engines["sm86"]).stat().st_size
    assert told["seconds"] > 0 and record.details["peak_rss_mb"] > 0
    assert "not run" in record.details["not_run"]


@builds
def test_a_builder_that_times_nothing_leaves_the_tiles_to_the_rule(product, tmp_path):
    """It takes the first tactic that it is offered: the first of the op's list."""
    engine = (tmp_path / build(product, tmp_path).engines["sm86"]).read_bytes()
    chosen = dict(re.findall(rb'name="(\w)_\w+"[^\n]* tactic_id="\w+_(\d+)"', engine))
    assert chosen == {b"q": b"0", b"y": b"1"}
    tactics = {entry["name"]: entry["tactics"] for entry in kernel.describe()}
    assert tactics["TernaryGemm"][0] == "rule" and not tactics["HadamardQuantize"]


@builds
def test_one_engine_serves_all_that_take_float32_and_one_turing(sample, tmp_path):
    record = build(sample.onnx, tmp_path, "12.0", "7.5", "8.0", "8.6", "8.9")
    assert list(record.engines) == ["sm80+86+89+120", "sm75"]
    masks = {label: inspect_engine(tmp_path / engine) for label, engine in record.engines.items()}
    assert masks["sm75"]["compute_capabilities"] == ["7.5"]
    assert masks["sm80+86+89+120"]["compute_capabilities"] == ["8.0", "8.6", "8.9", "12.0"]
    expected = {"HadamardQuantize": 2, "Int8Gemm": 1, "TernaryGemmLowRank": 1}
    for label, found in masks.items():
        told = record.details["engines"][label]
        assert found["magic"] == "vtrt" and found["plugins"] == expected == told["network_plugins"]
        assert told["packed_weights_found_once"] == told["packed_weights"] == 2
        assert ("float16" in told["float_parts"]) == (label == "sm75")
    assert (tmp_path / "tensorrt-rtx" / kernel.LIBRARY_NAME).read_bytes() == kernel.library_path().read_bytes()


@builds
def test_building_again_gives_the_same_bytes(product, tmp_path):
    once, again = ((tmp_path / name / build(product, tmp_path / name).engines["sm86"]) for name in ("a", "b"))
    assert once.read_bytes() == again.read_bytes()


def test_half_matmuls_compute_nearly_the_same(sample, tmp_path):
    model = ir.load(sample.onnx.path)
    use_half_products(model)
    nodes = [node.op_type for node in model.graph]
    assert nodes.count("Cast") == 3 and nodes.count("MatMul") == 1
    save_streamed(model, tmp_path / MODEL)
    got = open_session(tmp_path / MODEL, optimize=False).run(sample.inputs)
    assert list(got) == ["y"]
    np.testing.assert_allclose(got["y"], sample.output, rtol=0, atol=0.03 * abs(sample.output).max())
    assert (got["y"] != sample.output).any()


@builds
@pytest.mark.parametrize("capability", ("9.0", "sm86", ""))
def test_an_unknown_capability_names_the_known(sample, tmp_path, capability):
    with pytest.raises(Misuse, match=r"(?s)knows no compute capability.*8\.9"):
        build(sample.onnx, tmp_path, capability)


@builds
def test_a_library_that_is_none_is_refused(sample, tmp_path, monkeypatch):
    fake = tmp_path / kernel.LIBRARY_NAME
    fake.write_bytes(b"\x7fELF and nothing more")
    monkeypatch.setenv(kernel.LIBRARY_VARIABLE, str(fake))
    with pytest.raises(Misuse, match="cannot be loaded: .*") as caught:
        build(sample.onnx, tmp_path / "out")
    assert "cudaError 35" not in str(caught.value) and caught.value.cure
    fake.unlink()
    with pytest.raises(Misuse, match="the kernel library is not there"):
        build(sample.onnx, tmp_path / "out")


@builds
def test_a_node_that_tensorrt_does_not_know_is_named(product, tmp_path):
    model = onnx.load(product.path)
    model.graph.node[1].op_type = "MadeUp"
    onnx.save(model, tmp_path / MODEL)
    with pytest.raises(Failed, match=r"node y \(MadeUp\)") as caught:
        build(OnnxModel(tmp_path, product.manifest), tmp_path / "out")
    assert "cudaError 35" not in str(caught.value) and caught.value.cure


def test_a_form_without_plugins_is_refused(product, tmp_path):
    manifest = product.manifest.model_copy(update={"form": "qdq"})
    with pytest.raises(Misuse, match="takes the fused form"):
        build(OnnxModel(product.folder, manifest), tmp_path)


@builds
def test_a_full_disk_is_told(product, tmp_path):
    engine = tmp_path / "x.engine"
    entry = {"onnx": str(product.path), "engine": str(engine), "capabilities": ["8.6"]}
    job = {"module": "tensorrt_rtx", "library": str(kernel.library_path()), "engines": [entry]}
    job |= {"profile": {"x": [[1, 2, 4]]}, "timing_cache": None}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(Misuse, match="x.engine: cannot be written") as caught:
            trt_build.run_child(job, trt_build.environment("tensorrt_rtx", tmp_path), package="tensorrt-rtx")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "space" in caught.value.cure and not list(tmp_path.glob("*.engine*"))


@pytest.mark.parametrize(
    "code, message",
    (
        ("import os; os.kill(os.getpid(), 9)", "was ended by SIGKILL"),
        ("import os; os.abort()", "was ended by SIGABRT"),
        ("import os; os._exit(3)", "ended with exit code 3"),
        ("import time; time.sleep(60)", "took longer than"),
        ("raise ImportError('libthis.so.1 is missing')", "fake_trt cannot be imported: libthis.so.1 is missing"),
    ),
    ids=("killed", "aborted", "ended", "stuck", "broken"),
)
def test_a_child_that_ends_without_an_engine_is_told(tmp_path, monkeypatch, code: str, message: str):
    (tmp_path / "fake_trt.py").write_text(code)
    environment = trt_build.environment("fake_trt", tmp_path)
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), environment["PYTHONPATH"]])
    if "sleep" in code:
        monkeypatch.setattr(trt_build, "TIMEOUT", 1)
    with pytest.raises((Misuse, Failed), match=message) as caught:
        trt_build.run_child({"module": "fake_trt"}, environment, package="tensorrt-rtx")
    assert caught.value.cure


def test_a_file_that_is_no_engine_is_refused(tmp_path):
    path = tmp_path / "x.engine"
    with pytest.raises(Misuse, match="cannot be read"):
        inspect_engine(path)
    for content in (b"", b"vtrt", b"onnx" * 100):
        path.write_bytes(content)
        with pytest.raises(Misuse, match="is no TensorRT engine"):
            inspect_engine(path)


@builds
def test_a_truncated_engine_is_refused(product, tmp_path):
    engine = tmp_path / build(product, tmp_path).engines["sm86"]
    engine.write_bytes(engine.read_bytes()[:-1])
    with pytest.raises(Misuse, match="truncated"):
        inspect_engine(engine)


def test_a_missing_package_is_told(monkeypatch):
    monkeypatch.setattr(tensorrt_rtx, "MODULE", "no_such_module")
    able = tensorrt_rtx.availability()
    assert not able.can_build and not able.can_run
    assert able.reason == "no_such_module is not installed." and "pip install" in able.cure


def test_the_full_tensorrt_builds_only_where_its_gpu_is(sample, tmp_path):
    able = tensorrt.availability()
    if able.can_build:
        pytest.skip("there is a GPU and the full TensorRT: tests/targets/test_contract.py builds with it")
    assert able.reason and able.cure and not able.can_run
    with pytest.raises(Misuse, match="tensorrt cannot build here"):
        tensorrt.build(sample.onnx, root=tmp_path, options={})
    assert not list(tmp_path.iterdir())


def test_no_target_imports_its_runtime_when_it_is_asked_what_it_can_do():
    tensorrt_rtx.availability()
    assert "tensorrt_rtx" not in sys.modules and "tensorrt" not in sys.modules
