"""THE oracle: every op, every case, on everything that can run it, against the PyTorch definition.

A face is anything that runs a one-node ONNX model. Integers, and floats that are a fixed tree of operations (steps,
rotations, dequantized weights), are equal bit for bit, NaN to NaN. The results of GEMMs and of MonarchAdd are compared
with a float64 evaluation E of the same formula: a face may be off by at most

    2 |reference - E| + n u S,    u = 2**-24, the unit roundoff of float32,

where reference is PyTorch in float32, S the sum of the magnitudes of the terms that the face adds in float32, and n the
number of roundings that a term meets at most (Higham, Accuracy and Stability, 3.1: any order of summation is off by at
most n u S / (1 - n u)). A kernel sums the integers of a group exactly: its terms are s ws I_g, bias and t_r up_r, and
n = G + r + 6 (int to float, times ws, times s, G - 1 sums, the bias; r products and sums; the last sum). A function
body multiplies dequantized weights, so its terms are the s ws q_k w_k, of which K are added: n = 4 sqrt(K) + r + 6, the
probabilistic bound with lambda = 4 (Higham and Mary 2019, Theorem 2.4), since K itself would hide a wrong code. With a
residual all terms are multiplied by the gate, the residual is one more, and n is greater by 2. A Monarch branch is two
float sums one after the other, of K / A and of A r terms: n = 4 sqrt(K / A) + 4 sqrt(A r) + 6.

The kernels of a GPU take activations of float16 and bfloat16 too. E and all bounds are then those of the same numbers
in float32, and a result may be what that interval is rounded to, to nearest even: rounding is monotonous.
"""

import ctypes
import functools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from dit2deploy.base.errors import Failed, Misuse
from dit2deploy.formats import FORMATS, Format, pack, unpack
from dit2deploy.ops import MONARCH_ADD, OPS
from dit2deploy.ops.hadamard_quantize import hadamard
from dit2deploy.ops.op import NUMPY, ONNX, STREAMS, Case, Op
from dit2deploy.targets import cuda, kernel
from dit2deploy.targets.graph import OF_HALVES
from tests import over_pipe
from tests.packed import columns_of, in_packed_codes
from tests.plugins.ort_host import CUDA, OrtHost
from tests.tensors import as_array, as_tensor

ISAS = ("portable", "avx2", "avx512_vnni", "neon")
WEIGHT_PORTS = ("w", "ws", "bias", "up", "down")
GEMM_NAME = re.compile(r"(?P<format>\w+)Gemm(LowRank)?(Residual)?")


@dataclass(frozen=True)
class Face:
    """`run` skips with the reason where the face is not to be had here."""

    name: str
    run: Callable[[Op, Case], list[np.ndarray]]
    native: bool = True
    relaid: bool = False  # differs from the face without only where there are packed weights
    takes: Callable[[Case], bool] = lambda _: True  # the cases that it alone computes so

    def __str__(self) -> str:
        return self.name


def library(name: str = "") -> Path:
    """The kernel library, or a test build of that name beside it or in $D2D_TEST_LIBRARIES."""
    try:
        main = kernel.library_path()
    except Misuse as error:
        pytest.skip(error.cause)
    if not name:
        return main
    path = Path(os.environ.get("D2D_TEST_LIBRARIES", main.parent)) / name
    if not path.is_file():
        pytest.skip(f"{path} was not built")
    return path


def format_of(op: Op) -> Format | None:
    found = GEMM_NAME.fullmatch(op.name)
    return next(fmt for fmt in FORMATS if fmt.title == found["format"]) if found else None


def in_kernel_order(op: Op, case: Case, path: Path, layout: int = kernel.KERNEL_ORDER) -> Case:
    """The case with its weights in a kernels' layout, as `build` writes them."""
    fmt = format_of(op)
    if fmt is None:
        return case
    words = kernel.relayout(fmt.name, case.inputs["w"], columns_of(case), layout=layout, library=path)
    return replace(case, inputs={**case.inputs, "w": words}, attributes={**case.attributes, "layout": layout})


def in_onnx_reference(op: Op, case: Case) -> list[np.ndarray]:
    return ReferenceEvaluator(op.model(case)).run(None, dict(case.inputs))


def session(model: onnx.ModelProto, *, threads: int, path: Path | None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if path is None:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    else:
        options.register_custom_ops_library(str(path))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def in_onnxruntime_body(op: Op, case: Case) -> list[np.ndarray]:
    return session(op.model(case), threads=1, path=None).run(None, dict(case.inputs))


def in_raw_kernel(
    isa: str, op: Op, case: Case, *, layout: int = kernel.INTERCHANGE, name: str = ""
) -> list[np.ndarray]:
    path = library(name)
    if isa in ISAS and isa not in kernel.isas(library=path):
        pytest.skip(f"{path.name} does not run {isa} here")
    if layout != kernel.INTERCHANGE:
        case = in_kernel_order(op, case, library(), layout)
    inputs = [case.inputs[port.name] for port in op.inputs]
    attributes = {**op.attributes, **case.attributes}
    shapes = op.output_shapes([value.shape for value in inputs], attributes)
    return kernel.run(op.name, inputs, attributes, shapes, isa=isa, threads=2, library=path)


def in_emulated_cpu(cpu: str, op: Op, case: Case, *, layout: int) -> list[np.ndarray]:
    if layout != kernel.INTERCHANGE:
        case = in_kernel_order(op, case, library(), layout)
    inputs = [case.inputs[port.name] for port in op.inputs]
    attributes = {**op.attributes, **case.attributes}
    shapes = op.output_shapes([value.shape for value in inputs], attributes)
    return over_pipe.run(cpu, op.name, inputs, attributes, shapes, isa="neon", threads=2)


def in_onnxruntime_kernel(op: Op, case: Case, *, threads: int, relaid: bool) -> list[np.ndarray]:
    path = library()
    constants: tuple[str, ...] = ()
    if relaid:
        case = in_kernel_order(op, case, path)
        constants = tuple(port.name for port in op.inputs if port.name in WEIGHT_PORTS)
    model = op.model(case, constants=constants)
    del model.functions[:]  # so that it cannot be the body that answers
    feed = {name: value for name, value in case.inputs.items() if name not in constants}
    return session(model, threads=threads, path=path).run(None, feed)


def in_cuda(op: Op, case: Case, *, layout: int = kernel.INTERCHANGE) -> list[np.ndarray]:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        pytest.skip("no NVIDIA driver (libcuda.so.1)")
    return in_raw_kernel("cuda", op, case, layout=layout)


def for_wgmma(case: Case) -> bool:
    """Whether a GEMM's plan has a kernel for it: the tiles' cases over a whole K."""
    k = case.inputs["q"].shape[-1]
    return case.inputs["q"].size > 16 * k and case.inputs["ws"].shape[1] == 1 and k % 16 == 0


def on_wgmma(run: Callable[[Op, Case], list[np.ndarray]], op: Op, case: Case) -> list[np.ndarray]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIT2DEPLOY_CUDA", "wgmma")
        patch.setenv("D2D_HOST_CAPABILITY", "90")  # of the emulated GPU
        return run(op, case)


def in_cuda_on_hopper(op: Op, case: Case) -> list[np.ndarray]:
    try:
        if cuda.capability() != "9.0":
            pytest.skip(f"this GPU has compute capability {cuda.capability()}, wgmma is 9.0's")
    except Misuse as error:
        pytest.skip(error.cause)
    return in_cuda(op, case, layout=kernel.FRAGMENT_ORDER)


@functools.cache
def host_of_custom_ops() -> OrtHost:
    return OrtHost(library(), cuda.Device())


def in_cuda_custom_op(op: Op, case: Case) -> list[np.ndarray]:
    """As ONNX Runtime's CUDA provider would run it: tensors on the GPU, on a stream, weights in fragment order."""
    try:
        host = host_of_custom_ops()
    except Misuse as error:
        pytest.skip(error.cause)
    case = in_kernel_order(op, case, library(), kernel.FRAGMENT_ORDER)
    of_halves = case.attributes.get("dtype") == ONNX["f16"]
    return host.run(
        op.name + OF_HALVES * of_halves,
        CUDA,
        {**op.attributes, **case.attributes},
        [case.inputs[port.name] for port in op.inputs],
        [np.dtype(NUMPY[op.dtype(port, case.attributes)]) for port in op.outputs],
        constants=[index for index, port in enumerate(op.inputs) if port.name in WEIGHT_PORTS],
        stream=host.device.stream,
    )


ON_HOST = "libdit2deploy_host_cuda.so"
IN_FRAGMENTS_ON_HOST = functools.partial(in_raw_kernel, "cuda_on_host", layout=kernel.FRAGMENT_ORDER, name=ON_HOST)


FACES = (
    Face("onnx-reference", in_onnx_reference, native=False),
    Face("onnxruntime-body", in_onnxruntime_body, native=False),
    *(Face(f"raw-{isa}", functools.partial(in_raw_kernel, isa)) for isa in ISAS),
    *(
        Face(f"raw-{isa}-relaid", functools.partial(in_raw_kernel, isa, layout=kernel.KERNEL_ORDER), relaid=True)
        for isa in ISAS
    ),
    Face(
        "raw-portable-fragments",
        functools.partial(in_raw_kernel, "portable", layout=kernel.FRAGMENT_ORDER),
        relaid=True,
    ),
    *(
        Face(
            f"{isa}-emulated{'-relaid' if layout else ''}",
            functools.partial(in_raw_kernel, isa, layout=layout, name="libdit2deploy_emulated.so"),
            relaid=layout != kernel.INTERCHANGE,
        )
        # The emulated avx2 differs from the native one by the byte dot products of its GEMMs.
        for isa, layout in (
            ("avx512_vnni", kernel.INTERCHANGE),
            ("avx512_vnni", kernel.KERNEL_ORDER),
            ("avx2", kernel.KERNEL_ORDER),
        )
    ),
    Face("onnxruntime-kernel-inputs", functools.partial(in_onnxruntime_kernel, threads=2, relaid=False)),
    *(
        Face(f"onnxruntime-kernel-{threads}", functools.partial(in_onnxruntime_kernel, threads=threads, relaid=True))
        for threads in (1, 2)
    ),
    Face("cuda-on-host", functools.partial(in_raw_kernel, "cuda_on_host", name=ON_HOST)),
    Face("cuda-on-host-fragments", IN_FRAGMENTS_ON_HOST, relaid=True),
    Face("cuda-on-host-wgmma", functools.partial(on_wgmma, IN_FRAGMENTS_ON_HOST), relaid=True, takes=for_wgmma),
    *(
        Face(
            f"neon-{cpu}{'-relaid' if layout else ''}",
            functools.partial(in_emulated_cpu, cpu, layout=layout),
            relaid=relaid,
        )
        # The models differ in their GEMMs alone, which read weights in the kernels' order.
        for cpu, layout, relaid in (
            (over_pipe.CPUS[0], kernel.INTERCHANGE, False),
            *((cpu, kernel.KERNEL_ORDER, True) for cpu in over_pipe.CPUS),
        )
    ),
    Face("cuda", in_cuda),
    Face("cuda-fragments", functools.partial(in_cuda, layout=kernel.FRAGMENT_ORDER), relaid=True),
    Face("cuda-wgmma", functools.partial(on_wgmma, in_cuda_on_hopper), relaid=True, takes=for_wgmma),
    Face("cuda-custom-op", in_cuda_custom_op),
)
ON_GPU = ("cuda", "cuda-fragments", "cuda-wgmma", "cuda-custom-op")
TAKE_PACKED = ("cuda-on-host", "cuda-on-host-fragments", "cuda", "cuda-fragments", "cuda-custom-op")
TAKE_HALVES = {
    **dict.fromkeys(("cuda-on-host", "cuda-on-host-fragments", "cuda-on-host-wgmma"), ("f16", "bf16")),
    **dict.fromkeys(("cuda", "cuda-fragments", "cuda-wgmma"), ("f16", "bf16")),
    "cuda-custom-op": ("f16",),
}


def reference(op: Op, case: Case) -> list[np.ndarray]:
    tensors = [as_tensor(np.ascontiguousarray(case.inputs[port.name])) for port in op.inputs]
    return [as_array(tensor) for tensor in op.compute(*tensors, **{**op.attributes, **case.attributes})]


def in_type(op: Op, case: Case, dtype: str) -> Case:
    """The case with its activations rounded to a type of STREAMS."""
    inputs = dict(case.inputs)
    with np.errstate(over="ignore"):
        inputs |= {port.name: inputs[port.name].astype(NUMPY[dtype]) for port in op.inputs if port.dtype == "stream"}
    return replace(case, inputs=inputs, attributes={**case.attributes, "dtype": ONNX[dtype]})


def exact_gemm(fmt: Format, case: Case, *, body: bool) -> tuple[np.ndarray, np.ndarray]:
    """(E, n u S) of the module's docstring, float64 [.., N]."""
    q, s, ws = (case.inputs[name].astype(np.float64) for name in ("q", "s", "ws"))
    lead, k, (n, groups) = q.shape[:-1], q.shape[-1], ws.shape
    q = q.reshape(s.size, groups, k // groups).swapaxes(0, 1)  # [G, M, K / G]
    weight = unpack(case.inputs["w"], fmt, k).astype(np.float64).reshape(n, groups, k // groups).transpose(1, 2, 0)
    sums = q @ weight  # [G, M, N], exact
    terms = abs(q) @ abs(weight) if body else abs(sums)
    scale, bias = ws.T[:, None], case.inputs["bias"].astype(np.float64)
    value = (sums * scale).sum(0) * s.reshape(-1, 1) + bias
    magnitude = (terms * scale).sum(0) * abs(s.reshape(-1, 1)) + abs(bias)
    rank = 0
    if "t" in case.inputs:
        rank = case.inputs["up"].shape[1]
        t, up = case.inputs["t"].astype(np.float64).reshape(-1, rank), case.inputs["up"].astype(np.float64)
        value = value + t @ up.T
        magnitude = magnitude + abs(t) @ abs(up).T
    roundings = (4 * np.sqrt(k) if body else groups) + rank + 6
    if "residual" in case.inputs:
        before = case.inputs["residual"].astype(np.float64).reshape(-1, n)
        gate = case.inputs["gate"].astype(np.float64).reshape(-1, n)
        gate = gate[np.arange(len(before)) * len(gate) // max(1, len(before))]
        value, magnitude, roundings = before + gate * value, abs(before) + abs(gate) * magnitude, roundings + 2
    return value.reshape(*lead, n), (roundings * 2.0**-24 * magnitude).reshape(*lead, n)


def exact_monarch(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """(E, n u S) of the module's docstring, float64 [.., N], by a dense matrix built from the index convention."""
    plain, x, down, up = (case.inputs[name].astype(np.float64) for name in ("plain", "x", "down", "up"))
    (k, rank, b), (a, _, n) = down.shape, up.shape
    p = k // a

    def dense(down: np.ndarray, up: np.ndarray) -> np.ndarray:
        matrix = np.zeros((n, k))
        for i, j in np.ndindex(a, b):
            matrix[j::b, i * p : (i + 1) * p] = up[i, :, j::b].T @ down[i * p : (i + 1) * p, :, j].T
        return matrix

    value = plain + x @ dense(down, up).T
    magnitude = abs(plain) + abs(x) @ dense(abs(down), abs(up)).T
    return value, (4 * np.sqrt(p) + 4 * np.sqrt(a * rank) + 6) * 2.0**-24 * magnitude


@functools.cache
def _answers(
    op_name: str, case_name: str, dtype: str, packed: bool
) -> tuple[list[np.ndarray], dict[bool, tuple[np.ndarray, np.ndarray]]]:
    """The reference's outputs, float32, of a listed case whose activations are rounded to `dtype`, and `exact_gemm`
    without and with `body`: every face asks for them. Of packed codes E is that of the same codes, a byte each."""
    op = next(op for op in OPS if op.name == op_name)
    case = next(case for case in op.cases() if case.name == case_name)
    if dtype != "f32":
        case = in_type(op, in_type(op, case, dtype), "f32")
    fmt = format_of(op)
    exact = {body: exact_gemm(fmt, case, body=body) for body in (False, True)} if fmt else {}
    if op is MONARCH_ADD:
        exact = dict.fromkeys((False, True), exact_monarch(case))
    return reference(op, in_packed_codes(op, case) if packed else case), exact


def compare(op: Op, case: Case, got: list[np.ndarray], *, body: bool) -> None:
    """AssertionError where `got` is not what the definition says."""
    dtype = STREAMS[case.attributes.get("dtype", ONNX["f32"])]
    want, answers = _answers(op.name, case.name, dtype, bool(case.attributes.get("packed")))
    assert len(got) == len(want)
    for port, g, w in zip(op.outputs, got, want, strict=True):
        dtype = op.dtype(port, case.attributes)
        assert (g.dtype, g.shape) == (NUMPY[dtype], w.shape), port.name
        with np.errstate(over="ignore"):
            if not answers:
                # As float64, exactly: numpy does not know that a NaN of ml_dtypes is one.
                np.testing.assert_array_equal(*(x.astype(np.float64) for x in (g, w.astype(g.dtype))), port.name)
                continue
            exact, slack = answers[body]
            bounds = [exact + sign * (2 * abs(w - exact) + slack) for sign in (-1, 1)]
            low, high = bounds if dtype == "f32" else [bound.astype(g.dtype).astype(np.float64) for bound in bounds]
        np.testing.assert_array_equal(np.isnan(g), np.isnan(exact), err_msg="rows of NaN")
        with np.errstate(invalid="ignore"):
            excess = np.nan_to_num(np.maximum(low - g, g - high), nan=0.0)
        assert excess.size == 0 or excess.max() <= 0, (
            f"{(excess > 0).sum()} of {excess.size} values are off, the worst by {excess.max():.3g} more than allowed"
        )


def _pairs():
    for face in FACES:
        for op in OPS:
            if (op.native or not face.native) and (format_of(op) or not face.relaid):
                for case in filter(face.takes, op.cases()):
                    marks = [pytest.mark.gpu] if face.name in ON_GPU else []
                    yield pytest.param(face, op, case, id=f"{face}-{op}-{case}", marks=marks)


@pytest.mark.parametrize(("face", "op", "case"), _pairs())
def test_face_computes_what_the_reference_computes(face: Face, op: Op, case: Case):
    compare(op, case, face.run(op, case), body=not face.native)


def _halves():
    for face in FACES:
        for op in OPS:
            if "dtype" in op.attributes and (format_of(op) or not face.relaid):
                for case in op.cases():
                    for dtype in TAKE_HALVES.get(face.name, ()):
                        marks = [pytest.mark.gpu] if face.name in ON_GPU else []
                        yield pytest.param(face, op, case, dtype, id=f"{face}-{op}-{case}-{dtype}", marks=marks)


@pytest.mark.parametrize(("face", "op", "case", "dtype"), _halves())
def test_face_rounds_to_half_what_the_reference_computes(face: Face, op: Op, case: Case, dtype: str):
    case = in_type(op, case, dtype)
    compare(op, case, face.run(op, case), body=False)


def _packed():
    for face in FACES:
        for op in OPS:
            if face.name in TAKE_PACKED and (format_of(op) or not face.relaid):
                for case in filter(None, (in_packed_codes(op, case) for case in op.cases())):
                    marks = [pytest.mark.gpu] if face.name in ON_GPU else []
                    yield pytest.param(face, op, case, id=f"{face}-{op}-{case}-packed", marks=marks)


@pytest.mark.parametrize(("face", "op", "case"), _packed())
def test_face_packs_and_reads_packed_codes(face: Face, op: Op, case: Case):
    compare(op, case, face.run(op, case), body=False)


@pytest.mark.parametrize("dtype", ("f16", "bf16"))
@pytest.mark.parametrize("op", [op for op in OPS if "dtype" in op.attributes], ids=str)
def test_the_cpu_refuses_halves(op: Op, dtype: str):
    with pytest.raises(Failed, match=rf"CPU kernels take float32 \(dtype 1\), this node is of dtype {ONNX[dtype]}"):
        in_raw_kernel("portable", op, in_type(op, op.cases()[0], dtype))


@pytest.mark.parametrize("op", [op for op in OPS if format_of(op)], ids=str)
def test_one_wrong_code_is_refused(op: Op):
    """The oracle can fail: in every case with a token, one weight moved by one step is seen at a kernel's tolerance."""
    fmt = format_of(op)
    tried = 0
    for case in op.cases():
        q = case.inputs["q"]
        if not q.any():
            continue
        column = int(np.argmax(abs(q.reshape(-1, q.shape[-1]).astype(int)).max(0)))
        codes = unpack(case.inputs["w"], fmt, q.shape[-1]).astype(int)
        codes[0, column] += 1 if codes[0, column] < 0 else -1
        wrong = replace(case, inputs={**case.inputs, "w": pack(codes, fmt)})
        with pytest.raises(AssertionError, match="values are off"):
            compare(op, case, reference(op, wrong), body=False)
        tried += 1
    assert tried >= (20 if len(op.inputs) == 5 else 11)


def test_one_wrong_factor_is_refused():
    """A weight of a factor that takes another's place is seen at the tolerance of every case with a token."""
    for case in MONARCH_ADD.cases():
        for port in ("down", "up") if case.inputs["x"].size else ():
            wrong = case.inputs[port].copy()
            wrong.flat[:2] = wrong.flat[1::-1]
            with pytest.raises(AssertionError, match="values are off"):
                compare(
                    MONARCH_ADD,
                    case,
                    reference(MONARCH_ADD, replace(case, inputs={**case.inputs, port: wrong})),
                    body=False,
                )


@pytest.mark.parametrize("port", (0, 1))
def test_one_wrong_bit_of_a_quantizer_is_refused(port: int):
    op = OPS[0]
    case = next(case for case in op.cases() if case.name == "one-token-absmax")
    got = [value.copy() for value in reference(op, case)]
    bits = got[port].view(np.uint8)
    bits.flat[0] ^= 1
    with pytest.raises(AssertionError):
        compare(op, case, got, body=False)


def test_a_lost_nan_row_is_refused():
    op = OPS[1]
    case = next(case for case in op.cases() if case.name == "nan-row")
    got = [np.nan_to_num(value) for value in reference(op, case)]
    with pytest.raises(AssertionError, match="rows of NaN"):
        compare(op, case, got, body=False)


@pytest.mark.parametrize("tokens", (1, 3))
def test_a_rotation_leaves_its_input_as_it_was(tokens: int):
    """A low-rank branch reads it afterwards."""
    x = torch.randn(tokens, 64)
    before = x.clone()
    hadamard(x, block=64)
    assert torch.equal(x, before)
