"""Target ort-cuda without a GPU: what it writes, its buffers in host memory, what it says where the GPU is missing."""

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from dit2deploy.base.errors import Failed, Misuse
from dit2deploy.base.progress import listen
from dit2deploy.targets import cuda, kernel, ort_cuda
from dit2deploy.targets.ort import ON_CPU, OrtRunner, open_session
from dit2deploy.targets.ort_cuda_runner import OrtCudaRunner
from dit2deploy.targets.ort_placement import RECORD, check_placement, on_cpu

ROOT = Path(__file__).resolve().parents[2]
GPU_WHEEL = Path(os.environ.get("D2D_GPU_ORT", "/nowhere"))
GRAPH = """<ir_version: 10, opset_import: ["" : 20, "dit2deploy" : 1]>
placed (float[B, 8] x, float[1] qmax, int64[B] label, float[10, 8] table) => (float[B, 8] y) {
  [sizes] size = Shape (x)
  [twice] double = Add (size, size)
  [tall] tall = Cast <to = 1> (double)
  [row] row = Add (label, label)
  [look] found = Gather (table, row)
  [codes] q, s = dit2deploy.HadamardQuantize (found, qmax)
  [made] y = Add (found, found)
}"""


@pytest.fixture(scope="module")
def bundle(sample, tmp_path_factory):
    return sample.bundle(ort_cuda.TARGET, tmp_path_factory.mktemp("built") / "bundle")


@pytest.fixture
def notes():
    heard: list[str] = []
    forget = listen(lambda what, done, total: heard.append(what) if total == 0 else None)
    yield heard
    forget()


def test_weights_are_in_the_order_of_fragments(bundle, sample):
    model = ir.load(bundle.path("ort-cuda/model.onnx"))
    source = ir.load(sample.onnx.path).graph.initializers
    gemms = {node.op_type: node for node in model.graph if "Gemm" in node.op_type}
    assert {node.attributes["layout"].value for node in gemms.values()} == {kernel.FRAGMENT_ORDER}
    for op_type, fmt, name, k in (
        ("TernaryGemmLowRank", "ternary", "a.weight", 48),
        ("Int8Gemm", "int8", "b.weight", 40),
    ):
        want = kernel.relayout(fmt, source[name].const_value.numpy(), k, layout=kernel.FRAGMENT_ORDER)
        np.testing.assert_array_equal(gemms[op_type].inputs[2].const_value.numpy(), want)
    assert not model.functions and bundle.target("ort-cuda").details["layout"] == kernel.FRAGMENT_ORDER


def in_host_memory(bundle, *, captures: bool = True, calls: list[int] | None = None, refuse: bool = False):
    """The target's runner over a CPU session of its graph; `calls`: ids of CUDA graphs; `refuse`: no capture works."""
    path, library = bundle.path("ort-cuda/model.onnx"), bundle.path(f"ort-cuda/{kernel.LIBRARY_NAME}")

    def opened() -> OrtRunner:
        runner = open_session(path, library=library, prepack=True)
        run = runner.session.run_with_iobinding

        def told(binding, options):
            graph = int(options.get_run_config_entry("gpu_graph_id"))
            if calls is not None:
                calls.append(graph)
            if refuse and graph > 0:
                raise RuntimeError("operation not permitted when stream is capturing")
            run(binding, options)

        runner.session.run_with_iobinding = told
        return runner

    return OrtCudaRunner(opened(), captures=captures, reopen=opened, device="cpu")


def inputs_of(sample, seed: int, batch: int = 3) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).standard_normal((batch, 5, 48)).astype(np.float32)}


def test_each_set_of_shapes_is_captured_once_and_reads_new_inputs(bundle, sample, notes):
    calls: list[int] = []
    runner, plain = in_host_memory(bundle, calls=calls), in_host_memory(bundle, captures=False)
    kept = []
    for seed, batch in ((1, 3), (2, 3), (3, 1), (4, 3), (5, 1), (6, 1)):
        inputs = inputs_of(sample, seed, batch)
        got = runner.run(inputs)["y"]
        np.testing.assert_array_equal(got, plain.run(inputs)["y"])
        kept.append((got, got.copy()))
    assert calls == [-1, 1, -1, 1, 2, 2] and not notes
    for got, copy in kept:  # later calls leave what earlier ones gave
        np.testing.assert_array_equal(got, copy)
    got = runner.run(sample.inputs)["y"]
    np.testing.assert_allclose(got, sample.output, rtol=0, atol=2e-5 * abs(sample.output).max())
    runner.close()


def test_what_cannot_be_captured_runs_all_the_same_with_one_note(bundle, sample, notes):
    calls: list[int] = []
    runner, plain = in_host_memory(bundle, calls=calls, refuse=True), in_host_memory(bundle, captures=False)
    for seed in (1, 2, 3, 4):
        inputs = inputs_of(sample, seed)
        np.testing.assert_array_equal(runner.run(inputs)["y"], plain.run(inputs)["y"])
    assert calls == [-1, 1, -1, -1, -1]
    (told,) = notes
    assert "not permitted when stream is capturing" in told


@pytest.mark.parametrize(
    "inputs",
    ({}, {"x": np.zeros((1, 5, 47), np.float32)}, {"x": np.zeros((1, 5, 48))}, {"z": np.zeros((1, 5, 48), np.float32)}),
    ids=("nothing", "shape", "dtype", "name"),
)
def test_wrong_inputs_are_refused_and_forgotten(bundle, sample, inputs):
    runner = in_host_memory(bundle)
    for _ in range(2):
        with pytest.raises(Misuse, match="refused the inputs"):
            runner.run(inputs)
    assert list(runner.run(sample.inputs)) == ["y"]


def test_where_nodes_run_is_asked_of_the_session(bundle):
    path = bundle.path("ort-cuda/model.onnx")
    session = open_session(path, library=bundle.path(f"ort-cuda/{kernel.LIBRARY_NAME}"), config=RECORD).session
    if not hasattr(session, "get_provider_graph_assignment_info"):
        pytest.skip("this onnxruntime does not tell")
    names = {node.name for node in ir.load(path).graph if node.domain}
    assert names and names <= (on_cpu(session) or set())
    assert on_cpu(SimpleNamespace()) is None


@pytest.mark.parametrize(
    ("refuses", "placed", "told"),
    [
        (False, set(), ""),
        (False, None, "does not tell where nodes run"),
        (True, set(), "cannot use the graph capture feature"),
        (False, {"a.q_a.s"}, "belong on the GPU: a.q_a.s (HadamardQuantize)"),
    ],
    ids=("captured", "unknown", "refused", "misplaced"),
)
def test_why_steps_are_not_captured_is_told(bundle, monkeypatch, notes, refuses, placed, told):
    def session(path, *, library, graphs, **_):
        if graphs and refuses:
            raise Failed("This session cannot use the graph capture feature.", "None.")
        return open_session(path, library=library)

    monkeypatch.setattr(ort_cuda, "session_on_gpu", session)
    monkeypatch.setattr(ort_cuda, "on_cpu", lambda session: placed)
    path, library = bundle.path("ort-cuda/model.onnx"), bundle.path(f"ort-cuda/{kernel.LIBRARY_NAME}")
    try:
        ort_cuda.open_on_gpu(path, library=library, threads=1, values=()).close()
    except Failed as error:
        notes.append(error.cause)
    assert len(notes) == bool(told) and told in "".join(notes)


def test_only_what_computes_with_shapes_may_be_on_the_cpu():
    proto = onnx.parser.parse_model(GRAPH)
    for name, dtype in (("found", 1), ("row", 7), ("tall", 1), ("double", 7), ("q", 3), ("s", 1)):
        proto.graph.value_info.append(onnx.helper.make_tensor_value_info(name, dtype, None))
    model = ir.serde.deserialize_model(proto)
    check = partial(check_placement, model)
    assert check({"sizes", "twice", "tall", ""}) == ""
    assert check({"twice", "row"}) == "1 nodes that read more than shapes run on the CPU: row (Add)"
    for name, op in (("look", "Gather"), ("codes", "HadamardQuantize"), ("made", "Add")):
        with pytest.raises(Failed, match=rf"1 nodes on the CPU that belong on the GPU: {name} \({op}\)"):
            check({"row", name})


@pytest.mark.parametrize(("providers", "cause"), [([ON_CPU], "has no CUDA"), ([ort_cuda.PROVIDER], "no NVIDIA driver")])
def test_what_is_missing_is_told(bundle, monkeypatch, providers, cause):
    def no_gpu():
        raise Misuse("there is no NVIDIA driver (libcuda.so.1).", "Run this on a machine with an NVIDIA GPU.")

    fake = SimpleNamespace(__version__="1.31.1", get_available_providers=lambda: providers)
    monkeypatch.setattr(ort_cuda, "runtime", lambda: fake)
    monkeypatch.setattr(cuda, "capability", no_gpu)
    able = ort_cuda.availability()
    assert able.can_build and not able.can_run and cause in able.reason and able.cure
    with pytest.raises(Misuse, match=cause):
        ort_cuda.open_engine(bundle)


@pytest.mark.skipif(not GPU_WHEEL.is_dir(), reason="$D2D_GPU_ORT names no folder with onnxruntime-gpu")
def test_a_session_that_fell_back_to_the_cpu_is_refused(bundle):
    """The real onnxruntime-gpu, on a machine that has none of its libraries: it logs, and opens on the CPU."""
    code = (
        "from pathlib import Path\n"
        "from dit2deploy.base.errors import Failed\n"
        "from dit2deploy.targets import ort_cuda\n"
        f"path, library = Path({str(bundle.path('ort-cuda/model.onnx'))!r}), Path({str(kernel.library_path())!r})\n"
        "try:\n"
        "    ort_cuda.session_on_gpu(path, library=library, threads=1, values=(), graphs=False)\n"
        "except Failed as error:\n"
        "    print(error)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(GPU_WHEEL), str(ROOT))), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "could not open its CUDA provider" in done.stdout


def placements(log: str) -> dict[str, list[str]]:
    """Op types by provider, of a verbose log; a graph on one provider is only counted there, as "*"."""
    found: dict[str, list[str]] = {}
    provider = ""
    for line in log.splitlines():
        text = line.partition("VerifyEachNodeIsAssignedToAnEp]")[2]
        if head := re.match(r" +(All nodes|Node\(s\)) placed on \[(\w+)\]\. Number of nodes: (\d+)", text):
            provider = head[2]
            found[provider] = ["*"] * int(head[3]) if head[1] == "All nodes" else []
        elif node := re.match(r" +(\w+) \(.*\)", text):
            found[provider].append(node[1])
    return found


LOGGED = """
import sys
import onnxruntime as ort
model, library, *providers = sys.argv[1:]
options = ort.SessionOptions()
options.log_severity_level = 0
options.register_custom_ops_library(library)
ort.InferenceSession(model, options, providers=providers)
"""


def logged(bundle, *providers: str) -> str:
    files = bundle.path("ort-cuda/model.onnx"), bundle.path(f"ort-cuda/{kernel.LIBRARY_NAME}")
    command = [sys.executable, "-c", LOGGED, *map(str, files), *providers]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stderr


def test_the_placement_log_reads(bundle):
    count = len(list(ir.load(bundle.path("ort-cuda/model.onnx")).graph))
    assert placements(logged(bundle, ON_CPU)) == {ON_CPU: ["*"] * count}
    line = "2026-01-01 00:00:00 [V:onnxruntime:, session_state.cc:1 VerifyEachNodeIsAssignedToAnEp]"
    two = [
        *(" Node placements", "  Node(s) placed on [CUDAExecutionProvider]. Number of nodes: 2", "   MatMul (a)"),
        *("   TernaryGemm (b/c)", "  Node(s) placed on [CPUExecutionProvider]. Number of nodes: 1", "   Shape (d)"),
    ]
    found = placements("\n".join(line + text for text in two))
    assert found == {"CUDAExecutionProvider": ["MatMul", "TernaryGemm"], ON_CPU: ["Shape"]}


@pytest.mark.gpu
def test_the_whole_dit_is_on_the_gpu_by_the_runtimes_own_log(tmp_path):
    able = ort_cuda.availability()
    if not able.can_run:
        pytest.skip(f"ort-cuda: {able.reason}")
    from dit2deploy.stages.build import build
    from tests.bundles import sources

    bundle = build(sources().onnx, tmp_path / "bundle", targets=["ort-cuda"])
    found = placements(logged(bundle, ort_cuda.PROVIDER, ON_CPU))
    assert found[ort_cuda.PROVIDER] and not [op for ops in found.values() for op in ops if op.startswith("Memcpy")]
    runner = ort_cuda.open_engine(bundle)  # which refuses floats and ops of ours on the CPU
    runner.close()
