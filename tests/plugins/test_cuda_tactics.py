"""What a plan of the GEMMs can be given beside the tensors: a tactic in place of its rule, and a workspace."""

import functools
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dit2deploy.base.errors import Failed
from dit2deploy.formats import FORMATS, TERNARY, Format
from dit2deploy.ops import OPS
from dit2deploy.ops.op import NUMPY, ONNX, Case, Op
from dit2deploy.targets import kernel
from tests.plugins.gemms import in_fragments, never_launched, on_host, weights_of

ROOT = Path(__file__).resolve().parents[2]
TACTICS = ("rule", "64x64", "64x64_slice", "128x128", "128x128_wgmma", "128x256_wgmma")


def node_of(fmt: Format, m: int, n: int, k: int, dtype: str, library: Path):
    """Inputs and attributes of a plain GEMM with a y of that type."""
    rng = np.random.default_rng(m + n + k)
    q = rng.integers(-127, 127, (m, k), endpoint=True).astype(np.int8)
    s, ws = rng.uniform(0.01, 0.1, (m, 1)).astype(np.float32), rng.uniform(0.01, 0.1, (n, 1)).astype(np.float32)
    words = in_fragments(fmt, weights_of(fmt, n, k), library)
    inputs = [q, s, words, ws, rng.standard_normal(n).astype(np.float32)]
    return inputs, {"bits": 8, "layout": kernel.FRAGMENT_ORDER, "dtype": ONNX[dtype]}


@pytest.mark.parametrize("dtype", ("f16", "bf16"))
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_a_split_k_gives_a_y_of_halves_the_bits_of_a_whole_one(fmt: Format, dtype: str, library, monkeypatch, tmp_path):
    """Sums in a workspace, by the plan's own rule; tactic 64x64 does not split, and what it gives is rounded once."""
    host, (m, n) = Path(shutil.copy(on_host(library), tmp_path)), (70, 34)
    inputs, attributes = node_of(fmt, m, n, 64 * 64 + 16, dtype, library)

    def run(**how) -> np.ndarray:
        how = {"isa": "cuda_on_host", "library": host, **how}
        return kernel.run(f"{fmt.title}Gemm", inputs, attributes, [(m, n)], **how)[0]

    whole = run(tactic=TACTICS.index("64x64") + 1)
    assert {f"{fmt.name}_gemm_64x64_slice", "gemm_zero", "gemm_finish"} <= never_launched(host)
    np.testing.assert_array_equal(run(), whole)
    assert not {f"{fmt.name}_gemm_64x64_slice", "gemm_zero", "gemm_finish"} & never_launched(host)
    sums = (inputs[0].astype(np.int64) @ weights_of(fmt, n, 64 * 64 + 16).T).astype(np.float32)
    assert whole.dtype == NUMPY[dtype]
    np.testing.assert_array_equal(whole, (sums * inputs[3].T * inputs[1] + inputs[4]).astype(whole.dtype))


def test_tactics_keep_their_numbers(library):
    """Engines hold them."""
    listed = {entry["name"]: tuple(entry["tactics"]) for entry in kernel.describe(library=library)}
    assert listed == {name: TACTICS if "Gemm" in name else () for name in listed}


@pytest.mark.parametrize("tactic", TACTICS[1:])
def test_a_tactic_is_the_kernel_of_its_name(tactic: str, library, monkeypatch, tmp_path):
    """Where the rule would have taken 64x64: K too short for a split to pay, and long enough for one to be."""
    monkeypatch.setenv("D2D_HOST_CAPABILITY", "90")
    host, shape = Path(shutil.copy(on_host(library), tmp_path)), (70, 34)
    inputs, attributes = node_of(TERNARY, *shape, 32 * 64, "f16", library)
    run = functools.partial(kernel.run, "TernaryGemm", inputs, attributes, [shape], isa="cuda_on_host", library=host)
    assert f"ternary_gemm_{tactic}" in never_launched(host)
    if "wgmma" in tactic:
        with pytest.raises(
            Failed, match=f"tactic {TACTICS.index(tactic) + 1} is a kernel on wgmma: set DIT2DEPLOY_CUDA"
        ):
            run(tactic=TACTICS.index(tactic) + 1)
        monkeypatch.setenv("DIT2DEPLOY_CUDA", "wgmma")
    (y,) = run(tactic=TACTICS.index(tactic) + 1)
    assert f"ternary_gemm_{tactic}" not in never_launched(host)
    monkeypatch.setenv("DIT2DEPLOY_CUDA", "mma")
    before = never_launched(host)
    np.testing.assert_array_equal(y, run()[0])
    assert before - never_launched(host) <= {"ternary_gemm_64x64"}


# (M, N, K) that a tactic is no way to compute: few tokens; K not in steps of 16; too short to split; too many tiles.
ANOTHER = {"16": (16, 34, 2048), "any": (70, 34, 2047), "64x64": (70, 34, 1984), "128x128": (2000, 1000, 64)}


@pytest.mark.parametrize("kernel_name", ANOTHER)
def test_what_a_tactic_cannot_compute_goes_by_the_rule(kernel_name: str, library, tmp_path):
    host, (m, n, k) = Path(shutil.copy(on_host(library), tmp_path)), ANOTHER[kernel_name]
    inputs, attributes = node_of(TERNARY, m, n, k, "f32", library)
    before = never_launched(host)
    tactic = TACTICS.index("64x64_slice") + 1
    kernel.run("TernaryGemm", inputs, attributes, [(m, n)], isa="cuda_on_host", tactic=tactic, library=host)
    assert before - never_launched(host) == {f"ternary_gemm_{kernel_name}"}


@pytest.mark.parametrize("tactic", (-1, 7))
def test_a_number_that_is_no_tactic_is_refused(tactic: int, library):
    inputs, attributes = node_of(TERNARY, 1, 2, 64, "f32", library)
    with pytest.raises(Failed, match=f"there is no tactic {tactic}: known are 0, the op's rule, and 1 to 6"):
        kernel.run(
            "TernaryGemm", inputs, attributes, [(1, 2)], isa="cuda_on_host", tactic=tactic, library=on_host(library)
        )


def test_a_cpu_has_no_tactics(library):
    inputs, attributes = node_of(TERNARY, 1, 2, 64, "f32", library)
    with pytest.raises(Failed, match="tactics are of GPUs: the CPU kernels take 0 alone"):
        kernel.run("TernaryGemm", inputs, attributes, [(1, 2)], tactic=1, library=library)


def workspace(m: int, n: int, k: int, dtype: str, library: Path) -> int:
    memory = lambda dtype, *shape: kernel.Memory(1 << 20, np.dtype(dtype), shape)  # noqa: E731
    float32, words = np.float32, kernel.relayout_shape("ternary", n, k, layout=kernel.FRAGMENT_ORDER, library=library)
    inputs = [memory(np.int8, m, k), memory(float32, m, 1), memory(np.int32, *words), memory(float32, n, 1)]
    attributes = {"layout": kernel.FRAGMENT_ORDER, "dtype": ONNX[dtype]}
    y = memory(NUMPY[dtype], m, n)
    return kernel.workspace_bytes("TernaryGemm", [*inputs, memory(float32, n)], attributes, [y], library=library)


def test_a_workspace_is_enough_for_all_that_are_smaller(library):
    """TensorRT asks for it once, with the largest shapes: there K may be whole where it is split with fewer tokens."""
    n, k = 1152, 4608
    asked = [workspace(m, n, k, "f16", library) for m in (1, 16, 17, 64, 256, 448, 449, 4096)]
    assert asked == [0, 0, *(4 * n * m for m in (17, 64, 256, 448, 448, 448))]
    assert workspace(256, n, k, "f32", library) == 0  # y has room for its own
    assert workspace(256, n, 31 * 64, "f16", library) == 0 == workspace(256, n + 1, k, "f16", library)


def relaid(op: Op, case: Case, dtype: str, library: Path) -> Case:
    """A case of ternary weights in the kernels' layout, its activations in a type of STREAMS."""
    inputs, layout = dict(case.inputs), kernel.FRAGMENT_ORDER
    inputs["w"] = kernel.relayout("ternary", inputs["w"], inputs["q"].shape[-1], layout=layout, library=library)
    inputs |= {port.name: inputs[port.name].astype(NUMPY[dtype]) for port in op.inputs if port.dtype == "stream"}
    return replace(case, inputs=inputs, attributes={**case.attributes, "layout": layout, "dtype": ONNX[dtype]})


EPILOGUES = ("", "LowRank", "Residual", "LowRankResidual")


@pytest.mark.parametrize(
    ("name", "dtype"), [*((f"TernaryGemm{terms}", "f32") for terms in EPILOGUES), ("TernaryGemmLowRankResidual", "f16")]
)
def test_a_tactic_changes_no_bit(name: str, dtype: str, library, monkeypatch, tmp_path):
    """In all cases of the oracle, which looks at what the rule gives: tests/ops/test_numerics.py."""
    monkeypatch.setenv("D2D_HOST_CAPABILITY", "90")
    host, op = Path(shutil.copy(on_host(library), tmp_path)), next(op for op in OPS if op.name == name)
    for case in op.cases():
        case = relaid(op, case, dtype, library)
        inputs = [case.inputs[port.name] for port in op.inputs]
        attributes = {**op.attributes, **case.attributes}
        shapes = op.output_shapes([value.shape for value in inputs], attributes)
        run = functools.partial(kernel.run, op.name, inputs, attributes, shapes, isa="cuda_on_host", library=host)
        want = [value.view(np.uint8) for value in run()]
        for number, tactic in enumerate(TACTICS, start=1):
            with monkeypatch.context() as patch:
                patch.setenv("DIT2DEPLOY_CUDA", "wgmma" if "wgmma" in tactic else "mma")
                got = run(tactic=number)
            for one, other in zip(got, want, strict=True):
                np.testing.assert_array_equal(one.view(np.uint8), other, f"{case} by {tactic}")
    assert not {f"ternary_gemm_{tactic}" for tactic in TACTICS[1:]} & never_launched(host)


ENQUEUE = """
import ctypes
import numpy as np
from dit2deploy.targets import cuda, kernel
device, driver = cuda.Device(), ctypes.CDLL("libcuda.so.1")
driver.d2d_last_launched.restype = ctypes.c_char_p
m, n, k, rng = 70, 34, 64 * 64, np.random.default_rng(0)
q, w = rng.integers(-127, 127, (m, k)).astype(np.int8), rng.integers(-2**31, 2**31, (2, k * 2)).astype(np.int32)
held = q, np.full((m, 1), 0.01, np.float32), w, np.ones((n, 1), np.float32), np.zeros(n, np.float32)
y = np.zeros((m, n), np.float16)
memory = lambda value: kernel.Memory(value.ctypes.data, value.dtype, value.shape)
node = "TernaryGemm", [*map(memory, held)], {"layout": 2, "dtype": 10}, [memory(y)]
sums, found = np.zeros(kernel.workspace_bytes(*node) // 4, np.int32), []
for how in {}, {"workspace": sums.ctypes.data}, {"tactic": 4}:
    kernel.launcher(*node, **how)(device.stream)
    found.append(y.copy())
    print(driver.d2d_last_launched().decode(), np.count_nonzero(sums) > m * n // 2, np.array_equal(y, found[0]))
    y[:] = 0
"""


def test_the_c_entry_takes_a_tactic_and_a_workspace(driver):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LD_LIBRARY_PATH": str(driver.parent)}
    done = subprocess.run([sys.executable, "-c", ENQUEUE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "ternary_gemm_64x64 False True",
        "gemm_finish True True",
        "ternary_gemm_128x128 True True",
    ]
