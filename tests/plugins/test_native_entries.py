"""The library's entries: what they refuse at load, null pointers, what is exported, which variant runs.

Beside test_ort_adapter.py; free of torch, so that test_runtime_versions.py can run it under other ONNX Runtimes.
"""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from dit2deploy.formats import FORMATS, pack
from dit2deploy.targets import kernel

DOMAIN = "dit2deploy"
TERNARY = next(fmt for fmt in FORMATS if fmt.name == "ternary")
M, K, N, RANK = 6, 40, 35, 3
OUTPUTS = {
    "HadamardQuantize": {"q": TensorProto.INT8, "s": TensorProto.FLOAT},
    "AdaLnHadamardQuantize": {"q": TensorProto.INT8, "s": TensorProto.FLOAT},
    "ActivationHadamardQuantize": {"q": TensorProto.INT8, "s": TensorProto.FLOAT},
    "GatedActivationHadamardQuantize": {"q": TensorProto.INT8, "s": TensorProto.FLOAT},
    "MultiRegionQuantize": {
        **dict.fromkeys(("q_low", "q_high"), TensorProto.INT8),
        **dict.fromkeys(("s_low", "s_high"), TensorProto.FLOAT),
    },
}


def quantizer(**changes) -> dict[str, np.ndarray]:
    x = np.random.default_rng(0).standard_normal((M, 64)).astype(np.float32)
    return {"x": x, "qmax": np.array([7], np.float32), **changes}


def modulated(**changes) -> dict[str, np.ndarray]:
    x, qmax = quantizer().values()
    rows = {"shift": np.zeros((2, 64), np.float32), "scale": np.zeros((2, 64), np.float32)}
    return {"x": x, **rows, "eps": np.array([1e-6], np.float32), "qmax": qmax, **changes}


def activated(factor: np.ndarray) -> dict[str, np.ndarray]:
    x, qmax = quantizer().values()
    return {"x": x, "factor": factor, "qmax": qmax}


def regions(**changes) -> dict[str, np.ndarray]:
    table = {"qmax": np.array([127], np.float32), "regions": np.array([[0, 0.01, 0.1]], np.float32)}
    return {"x": quantizer()["x"], **table, **changes}


def products(**changes) -> dict[str, np.ndarray]:
    codes = {"a": np.ones((1, 2, 5, 8), np.int8), "b": np.ones((1, 2, 7, 8), np.int8)}
    steps = {"sa": np.ones((1, 2, 5, 1), np.float32), "sb": np.ones((1, 2, 7, 1), np.float32)}
    made = {**codes, **steps, **changes}
    return {name: made[name] for name in ("a", "sa", "b", "sb")}


def gemm(*, low_rank: bool = False, **changes) -> dict[str, np.ndarray]:
    """Inputs of a ternary GEMM in the interchange layout, small whole numbers: every order of the sums is exact."""
    rng = np.random.default_rng(1)
    inputs = {
        "q": rng.integers(-7, 8, (M, K)).astype(np.int8),
        "s": np.full((M, 1), 0.5, np.float32),
        "w": pack(rng.integers(-1, 2, (N, K)), TERNARY),
        "ws": np.full((N, 1), 2.0, np.float32),
        "bias": rng.integers(-9, 10, N).astype(np.float32),
    }
    if low_rank:
        inputs["t"] = rng.integers(-3, 4, (M, RANK)).astype(np.float32)
        inputs["up"] = rng.integers(-3, 4, (N, RANK)).astype(np.float32)
    return {**inputs, **changes}


def gated(**changes) -> dict[str, np.ndarray]:
    """Beside those of `gemm`: a residual, and the gates of two samples."""
    stream = {"residual": np.ones((M, N), np.float32), "gate": np.ones((2, 1, N), np.float32)}
    return gemm(**stream | changes)


def branch(**changes) -> dict[str, np.ndarray]:
    """A 2 x 2 grid of rank 3, K 8 and N 6."""
    shapes = {"plain": (5, 6), "x": (5, 8), "down": (8, 3, 2), "up": (2, 3, 6)}
    return {name: np.ones(shape, np.float32) for name, shape in shapes.items()} | changes


def expected(*, low_rank: bool = False) -> np.ndarray:
    inputs = gemm(low_rank=low_rank)
    weight = np.random.default_rng(1)
    weight.integers(-7, 8, (M, K))  # the draws of `gemm`, in its order
    y = inputs["q"].astype(int) @ weight.integers(-1, 2, (N, K)).T + inputs["bias"]
    return y + inputs["t"] @ inputs["up"].T if low_rank else y


def model(op: str, inputs: dict[str, np.ndarray], constants: tuple[str, ...] = (), **attributes) -> bytes:
    outputs = OUTPUTS.get(op, {"y": TensorProto.FLOAT})
    graph = helper.make_graph(
        [helper.make_node(op, list(inputs), list(outputs), domain=DOMAIN, **attributes)],
        "one",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), [None] * value.ndim)
            for name, value in inputs.items()
            if name not in constants
        ],
        [helper.make_tensor_value_info(name, dtype, None) for name, dtype in outputs.items()],
        [numpy_helper.from_array(inputs[name], name) for name in constants],
    )
    imports = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10).SerializeToString()


def session(library: Path, content: bytes, *, threads: int = 1) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def run(library: Path, op: str, inputs: dict[str, np.ndarray], constants: tuple[str, ...] = (), **attributes):
    made = session(library, model(op, inputs, constants, **attributes))
    return made.run(None, {name: value for name, value in inputs.items() if name not in constants})


WEIGHTS = ("w", "ws", "bias")


@pytest.mark.parametrize("constants", ((), WEIGHTS), ids=("inputs", "initializers"))
@pytest.mark.parametrize("low_rank", (False, True), ids=("plain", "low-rank"))
@pytest.mark.parametrize("layout", (kernel.INTERCHANGE, kernel.KERNEL_ORDER))
def test_a_gemm_is_exact(library, low_rank, layout, constants):
    inputs = gemm(low_rank=low_rank)
    if layout == kernel.KERNEL_ORDER:
        inputs["w"] = kernel.relayout("ternary", inputs["w"], K, library=library)
    op = "TernaryGemmLowRank" if low_rank else "TernaryGemm"
    (y,) = run(library, op, inputs, constants, bits=4, layout=layout)
    np.testing.assert_array_equal(y, expected(low_rank=low_rank))


def test_absent_attributes_have_their_defaults(library):
    written = run(library, "HadamardQuantize", quantizer(), block=1, clip="absmax")
    for got, want in zip(run(library, "HadamardQuantize", quantizer()), written, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("op", "attributes", "said"),
    (
        ("HadamardQuantize", {"block": 16.0}, "attribute block must be an integer"),
        ("HadamardQuantize", {"block": "16"}, "attribute block must be an integer"),
        ("HadamardQuantize", {"clip": 1}, "attribute clip must be a text"),
    ),
)
def test_an_attribute_of_another_type_stops_the_load(library, op, attributes, said):
    inputs = quantizer() if op == "HadamardQuantize" else gemm()
    with pytest.raises(Exception) as caught:
        session(library, model(op, inputs, **attributes))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    (
        ({"bias": np.zeros(N + 1, np.float32)}, "bias must hold 35 values, one an output"),
        ({"w": np.zeros((N + 1, 2), np.int32)}, "w must be [35, a multiple of 1]"),
        ({"w": np.zeros((N, 2, 1), np.int32)}, "w and ws must have two dimensions"),
        ({"ws": np.ones((N - 1, 1), np.float32)}, "bias must hold 34 values"),
    ),
    ids=("bias", "words", "rank", "scales"),
)
def test_constant_weights_that_do_not_fit_stop_the_load(library, changes, said):
    with pytest.raises(Exception) as caught:
        session(library, model("TernaryGemm", gemm(**changes), WEIGHTS))
    assert f"TernaryGemm: {said}" in str(caught.value)


DEEP = {  # |sums| of its extremes are 2^31 and more
    "q": np.zeros((1, 140000), np.int8),
    "s": np.ones((1, 1), np.float32),
    "w": np.zeros((1, 35000), np.int32),
    "ws": np.ones((1, 1), np.float32),
    "bias": np.zeros(1, np.float32),
}


@pytest.mark.parametrize(
    ("op", "inputs", "attributes", "said"),
    (
        ("TernaryGemm", gemm(w=np.zeros((N, 5), np.int32)), {}, "w must be [35, 2] for 35 outputs and 40 columns"),
        ("TernaryGemm", gemm(s=np.ones((M + 1, 1), np.float32)), {}, "s must have the rows of q"),
        ("TernaryGemm", gemm(ws=np.ones((N, 3), np.float32)), {}, "3 groups do not divide the 40 columns of q"),
        ("Int8Gemm", DEEP, {}, "sums of 140000 columns of int8 weights may leave int32: at most 131071 share a scale"),
        ("TernaryGemmLowRank", gemm(low_rank=True, up=np.ones((N, 9), np.float32)), {}, "t must be [.., r]"),
        ("TernaryGemmResidual", gated(residual=np.ones((M, N + 1), np.float32)), {}, "residual must be [.., 35]"),
        (
            "TernaryGemmResidual",
            gated(residual=np.ones((M - 1, N), np.float32)),
            {},
            "residual must have the rows of q",
        ),
        (
            "TernaryGemmResidual",
            gated(gate=np.ones((2, 1), np.float32)),
            {},
            "gate must have the 35 columns of residual",
        ),
        (
            "TernaryGemmResidual",
            gated(gate=np.ones((4, N), np.float32)),
            {},
            "gate has 4 rows, which do not divide the 6",
        ),
        ("HadamardQuantize", quantizer(), {"block": 128}, "block 128 does not divide the 64 columns of x"),
        ("HadamardQuantize", quantizer(qmax=np.full(4, 7, np.float32)), {}, "which do not divide the 6 rows of x"),
        ("AdaLnHadamardQuantize", modulated(shift=np.ones((3, 64), np.float32)), {}, "shift has 3 rows and scale 2"),
        ("AdaLnHadamardQuantize", modulated(scale=np.ones((2, 1), np.float32)), {}, "must have the 64 columns of x"),
        ("AdaLnHadamardQuantize", modulated(eps=np.ones(2, np.float32)), {}, "eps must have the shape [1]"),
        (
            "AdaLnHadamardQuantize",
            modulated(**dict.fromkeys(("shift", "scale"), np.ones((4, 64), np.float32))),
            {},
            "shift has 4 rows, which do not divide the 6 rows of x",
        ),
        (
            "GatedActivationHadamardQuantize",
            activated(np.ones((1, 64), np.float32)),
            {},
            "factor must have the shape of x",
        ),
        (
            "ActivationHadamardQuantize",
            quantizer(),
            {"activation": "gelu"},
            "activation must be 'gelu-tanh' or 'silu', got 'gelu'",
        ),
        ("MonarchAdd", branch(up=np.ones((2, 4, 6), np.float32)), {}, "down has rank 3 and up has rank 4"),
        ("MonarchAdd", branch(x=np.ones((5, 9), np.float32)), {}, "x must have 8 columns, the rows of down, got 9"),
        (
            "MultiRegionQuantize",
            regions(regions=np.ones((2, 3), np.float32)),
            {},
            "qmax has 1 values and regions 2 rows",
        ),
        ("MultiRegionQuantize", regions(regions=np.ones((1, 2), np.float32)), {}, "regions must be [R, 3]"),
        ("QuantMatMul", products(b=np.ones((1, 2, 7, 9), np.int8)), {}, "a has 8 columns and b 9"),
        ("QuantMatMul", products(b=np.ones((1, 3, 7, 8), np.int8)), {}, "b must have the items and heads of a"),
        ("QuantMatMul", products(sa=np.ones((1, 2, 7, 1), np.float32)), {}, "sa must have the rows of a"),
    ),
    ids=(
        "words",
        "steps",
        "groups",
        "depth",
        "rank",
        "residual-columns",
        "residual-rows",
        "gate-columns",
        "gate-samples",
        "block",
        "qmax",
        "modulation-rows",
        "modulation-columns",
        "eps",
        "modulation-samples",
        "factor",
        "activation",
        "grid",
        "monarch-columns",
        "tables",
        "columns",
        "inner",
        "heads",
        "rows",
    ),
)
def test_a_wrong_shape_stops_the_run_with_our_message(library, op, inputs, attributes, said):
    with pytest.raises(Exception) as caught:
        run(library, op, inputs, **attributes)
    assert said in str(caught.value)


def test_a_session_outlives_a_refused_run(library):
    made = session(library, model("TernaryGemm", gemm()))
    with pytest.raises(Exception, match="s must have the rows of q"):
        made.run(None, gemm(s=np.ones((M + 1, 1), np.float32)))
    np.testing.assert_array_equal(made.run(None, gemm())[0], expected())


def test_a_missing_input_is_refused(library):
    inputs = gemm()
    del inputs["bias"]
    with pytest.raises(Exception, match="TernaryGemm"):
        session(library, model("TernaryGemm", inputs))


def _in_a_process(library: Path, **environment: str) -> subprocess.CompletedProcess:
    code = (
        "import sys; from pathlib import Path\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import numpy as np, test_native_entries as t\n"
        f"(y,) = t.run(Path({str(library)!r}), 'TernaryGemm', t.gemm())\n"
        "np.testing.assert_array_equal(y, t.expected()); print('exact')"
    )
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH", ""), root)))
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


def test_every_variant_that_runs_here_can_be_forced(library):
    for isa in kernel.isas(library=library):
        done = _in_a_process(library, DIT2DEPLOY_CPU=isa)
        assert done.stdout == "exact\n", done.stderr


def test_a_variant_that_this_machine_lacks_is_an_error(library):
    lacking = [isa for isa in ("avx2", "avx512_vnni", "neon") if isa not in kernel.isas(library=library)]
    assert lacking, "no machine runs both AVX-512 and NEON"
    done = _in_a_process(library, DIT2DEPLOY_CPU=lacking[0])
    assert done.returncode == 1 and f"DIT2DEPLOY_CPU={lacking[0]} does not run on this CPU" in done.stderr


def test_only_the_entry_points_are_exported(library):
    found = subprocess.run(["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True)
    if found.returncode:
        pytest.skip(f"nm: {found.stderr.strip()}")
    names = {line.split()[-1] for line in found.stdout.splitlines()}
    entries = {"RegisterCustomOps", "getCreators", "setLoggerFinder"}
    assert {name for name in names if not name.startswith("d2d_")} == entries


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("dtype", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("dims", ctypes.POINTER(ctypes.c_int64)),
        ("data", ctypes.c_void_p),
    )


class _CCall:
    """One call of d2d_run that is right; tests spoil a part of it."""

    def __init__(self, library: Path) -> None:
        self.loaded = ctypes.CDLL(str(library))
        self.loaded.d2d_last_error.restype = ctypes.c_char_p
        self.arrays = [*quantizer().values(), np.zeros((M, 64), np.int8), np.zeros((M, 1), np.float32)]
        tensors = [
            _Tensor(1 if a.dtype == np.float32 else 3, a.ndim, (ctypes.c_int64 * a.ndim)(*a.shape), a.ctypes.data)
            for a in self.arrays
        ]
        self.inputs, self.outputs = (_Tensor * 2)(*tensors[:2]), (_Tensor * 2)(*tensors[2:])

    def __call__(self, *, inputs=..., outputs=..., attributes: int = 0, threads: int = 1) -> str:
        """The error, or "" where it ran."""
        status = self.loaded.d2d_run(
            *(b"HadamardQuantize", None, threads, 0, None, ctypes.c_size_t(attributes)),
            *(self.inputs if inputs is ... else inputs, ctypes.c_size_t(2)),
            *(self.outputs if outputs is ... else outputs, ctypes.c_size_t(2)),
        )
        return self.loaded.d2d_last_error().decode() if status else ""


def test_the_c_entry_refuses_null_pointers_instead_of_crashing(library):
    call = _CCall(library)
    assert call() == ""
    assert call(inputs=None) == "the tensors are NULL"
    assert call(outputs=None) == "the tensors are NULL"
    assert call(attributes=1) == "the attributes are NULL"
    call.inputs[0].data = None
    assert call() == "x is NULL"
    call.inputs[0].dims = None
    assert call() == "x has no dims"


def test_the_c_entry_refuses_null_pointers_of_a_relayout(library):
    loaded = _CCall(library).loaded
    out, size = (ctypes.c_int32 * 4096)(), ctypes.c_int64()

    def relayout(words, rows) -> str:
        shape = ctypes.c_int64(4), ctypes.c_int64(8)
        status = loaded.d2d_relayout(b"int8", ctypes.c_int64(1), *shape, words, out, rows, ctypes.byref(size))
        return loaded.d2d_last_error().decode() if status else ""

    assert relayout((ctypes.c_int32 * 8)(), ctypes.byref(size)) == ""
    assert relayout(None, ctypes.byref(size)) == "words is NULL"
    assert relayout((ctypes.c_int32 * 8)(), None) == "rows and columns must not be NULL"


def test_more_threads_than_tasks_compute_the_same(library):
    call = _CCall(library)
    assert call(threads=1) == ""
    q = call.arrays[2].copy()
    call.arrays[2][...] = 0
    assert call(threads=100_000) == ""
    np.testing.assert_array_equal(call.arrays[2], q)
    assert call(threads=0) == "threads must be at least 1"
