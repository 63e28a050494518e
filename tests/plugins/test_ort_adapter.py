"""The custom-op library in ONNX Runtime: what is wrong is told in our words, one session serves many threads, and the
same binary runs in the oldest and the newest runtime that we support."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from dit2deploy.formats import TERNARY, pack
from dit2deploy.ops import DOMAIN, GEMMS, HADAMARD_QUANTIZE
from dit2deploy.targets import kernel

ROOT = Path(__file__).resolve().parents[2]
K, N, M = 96, 40, 7


def network(
    *,
    block: int = 32,
    clip: str = "absmax",
    grid: str | None = None,
    bits: int = 4,
    layout: int = 1,
    **changes: np.ndarray,
) -> bytes:
    """x -> HadamardQuantize -> TernaryGemm -> y, without function bodies; `changes` replace constants.

    Without `grid` the node is as models from before that attribute have it.
    """
    codes = np.random.default_rng(0).integers(-1, 1, (N, K), endpoint=True)
    words = pack(codes, TERNARY)
    constants = {
        "qmax": np.array([7], np.float32),
        "w": kernel.relayout("ternary", words, K) if layout == 1 else words,
        "ws": np.full((N, 1), 0.1, np.float32),
        "bias": np.arange(N, dtype=np.float32),
        **changes,
    }
    gemm = GEMMS["ternary"]
    nodes = [
        helper.make_node(
            "HadamardQuantize", ["x", "qmax"], ["q", "s"], domain=DOMAIN, block=block, clip=clip, grid=grid
        ),
        helper.make_node(gemm.name, ["q", "s", "w", "ws", "bias"], ["y"], domain=DOMAIN, bits=bits, layout=layout),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", K])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", N])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    imports = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10).SerializeToString()


def session(model: bytes, *, threads: int = 1) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(kernel.library_path()))
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def tokens(m: int = M) -> np.ndarray:
    return np.random.default_rng(m).standard_normal((m, K)).astype(np.float32)


def expected(x: np.ndarray) -> np.ndarray:
    """By the raw kernels, which tests/ops/test_numerics.py holds against the definition."""
    model = onnx.load_from_string(network(layout=0))
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    attributes = {"block": 32, "clip": "absmax"}
    q, s = kernel.run(HADAMARD_QUANTIZE.name, [x, constants["qmax"]], attributes, [x.shape, (len(x), 1)])
    inputs = [q, s, constants["w"], constants["ws"], constants["bias"]]
    return kernel.run("TernaryGemm", inputs, {"bits": 4}, [(len(x), N)], isa="portable")[0]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("layout", [0, 1])
def test_a_network_of_our_ops_runs(threads, layout):
    for m in (0, 1, M, 100):
        got = session(network(layout=layout), threads=threads).run(None, {"x": tokens(m)})[0]
        np.testing.assert_allclose(got, expected(tokens(m)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"block": 24}, "HadamardQuantize: block must be a power of two"),
        ({"grid": "odd"}, "HadamardQuantize: grid must be 'mid-tread' or 'mid-rise', got 'odd'"),
        ({"clip": "median"}, "HadamardQuantize: clip must be 'absmax' or 'gaussian', got 'median'"),
        ({"bits": 9}, "TernaryGemm: bits must be from 2 to 8, got 9"),
        ({"layout": 7, "w": np.zeros((1, 1), np.int32)}, "TernaryGemm: layout 7 is not known"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_attribute_stops_the_session(change, text):
    with pytest.raises(Exception, match=text.replace("(", "\\(")):
        session(network(**change))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"block": 64}, "block 64 does not divide the 96 columns of x"),
        ({"qmax": np.array([7, 7], np.float32)}, "2 values, which do not divide the 7 rows"),
        ({"w": np.zeros((3, 5), np.int32)}, "w must be .* got .3, 5."),
        ({"ws": np.ones((N, 5), np.float32)}, "5 groups do not divide the 96 columns"),
        ({"bias": np.zeros(3, np.float32)}, "bias must hold 40 values"),
    ],
    ids=["block", "qmax", "w", "ws", "bias"],
)
def test_a_wrong_shape_is_told(change, text):
    with pytest.raises(Exception, match=text):
        session(network(**change)).run(None, {"x": tokens()})


def test_a_wrong_dtype_is_refused_at_load():
    with pytest.raises(Exception, match=r"INVALID_GRAPH.*Type"):
        session(network(ws=np.ones((N, 1), np.float64)))


def test_one_session_serves_many_threads():
    served, wrong = session(network(), threads=2), []
    want = {m: served.run(None, {"x": tokens(m)})[0] for m in (1, 3, 50)}

    def work():
        for _ in range(30):
            for m, y in want.items():
                if not np.array_equal(served.run(None, {"x": tokens(m)})[0], y):
                    wrong.append(m)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def test_sessions_come_and_go():
    for _ in range(20):
        session(network()).run(None, {"x": tokens()})


def test_a_forced_variant_that_does_not_exist_is_told():
    code = "from tests.plugins.test_ort_adapter import *; session(network())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "DIT2DEPLOY_CPU": "abacus", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "unknown instruction set 'abacus'; known: portable, avx2" in done.stderr


RUNTIMES = {"onnxruntime 1.18": "D2D_OLD_ORT", "onnxruntime-gpu on a CPU": "D2D_GPU_ORT"}
ELSEWHERE = """
import sys
import numpy as np
import onnxruntime as ort
model, library, inputs, outputs, bad = sys.argv[1:]
options = ort.SessionOptions()
options.register_custom_ops_library(library)
session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
np.save(outputs, session.run(None, {"x": np.load(inputs)})[0])
try:
    ort.InferenceSession(bad, options, providers=["CPUExecutionProvider"])
except Exception as error:
    print(error)
print(ort.__version__)
"""


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_same_library_in_another_runtime(runtime, tmp_path):
    folder = os.environ.get(RUNTIMES[runtime])
    if not folder or not (Path(folder) / "onnxruntime").is_dir():
        pytest.skip(f"{runtime}: ${RUNTIMES[runtime]} names no folder with it (`make test` makes one)")
    (tmp_path / "model.onnx").write_bytes(network())
    (tmp_path / "bad.onnx").write_bytes(network(block=24))
    np.save(tmp_path / "x.npy", tokens())
    names = [
        tmp_path / "model.onnx",
        kernel.library_path(),
        tmp_path / "x.npy",
        tmp_path / "y.npy",
        tmp_path / "bad.onnx",
    ]
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *map(str, names)],
        env={**os.environ, "PYTHONPATH": folder},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "block must be a power of two" in done.stdout
    assert done.stdout.split()[-1] != onnxruntime.__version__ or "gpu" in runtime
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), expected(tokens()), rtol=1e-5, atol=1e-5)
