"""The benchmark for GPUs: all of it but the times, with the emulator in place of the driver; and the driver's calls."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dit2deploy.base.errors import Misuse
from dit2deploy.targets import kernel

ROOT = Path(__file__).resolve().parents[1]
ON_HOST = ROOT / "tests" / "bench_gpu_on_host.py"


@pytest.fixture(scope="module")
def driver() -> Path:
    try:
        main = kernel.library_path()
    except Misuse as error:
        pytest.skip(error.cause)
    path = Path(os.environ.get("D2D_TEST_LIBRARIES", main.parent)) / "driver" / "libcuda.so.1"
    if not path.is_file():
        pytest.skip(f"{path} was not built")
    return path


def run(command: list, **environment: str) -> subprocess.CompletedProcess:
    own = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(list(map(str, command)), cwd=ROOT, env=own, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def whole(driver, tmp_path_factory) -> tuple[subprocess.CompletedProcess, dict]:
    out = tmp_path_factory.mktemp("bench") / "bench_gpu.json"
    done = run([sys.executable, ON_HOST, driver, out, "--compile-seconds", "0"])
    assert done.returncode == 0, done.stdout + done.stderr
    return done, json.loads(out.read_text())


def test_every_kernel_is_checked_and_recorded(whole):
    _, record = whole
    assert record["kind"] == "bench_gpu" and record["faults"] == [] and {"torch", "numpy"} <= set(record["versions"])
    assert [told["what"] for told in record["bundles"]] == [
        f"bundle of {target} against the reference" for target in ("ort-cuda", "tensorrt-rtx", "tensorrt")
    ]
    assert all(told["reason"] == "no --bundle was given." for told in record["bundles"])
    names = {(row["what"], *row["shape"].values()) for row in record["rows"]}
    gemms = {
        (f"{fmt} GEMM{to}", m, k, n)
        for fmt in ("ternary", "int3", "int4", "int8")
        for to in ("", " to float16", " to bfloat16")
        for m in (1, 16, 70)
        for k, n in ((144, 80), (256, 72))
    } | {
        (f"{fmt} GEMM of packed codes{to}", m, 256, 72)
        for fmt in ("ternary", "int3", "int4")
        for to in ("", " to float16", " to bfloat16")
        for m in (1, 16, 70)
    }
    quantizers = {
        (f"{prefix}HadamardQuantize{of}", m, k)
        for m in (1, 70)
        for prefix, k in (("", 96), ("AdaLn", 192), ("Activation", 512), ("GatedActivation", 160))
        for of in ("", " of float16", " of bfloat16")
    }
    assert names == gemms | quantizers | {("blocks of a step", 2, 9, 2)}
    for row in record["rows"]:
        if "GEMM" in row["what"]:
            assert 0 <= row["error_of_its_bound"] < 1
            assert "were over" in row["not_measured"]["torch.compile fp16"]
        if row["what"] == "blocks of a step":
            assert row["sqnr_db"] > 25


def test_bounds_and_ratios_are_arithmetic_on_what_was_measured(whole):
    """The made-up device copies 1e12 bytes and does 2e14 operations a second; contestants take 10, 20 and 15 us."""
    done, record = whole
    row = next(r for r in record["rows"] if r["what"] == "ternary GEMM" and r["shape"] == {"m": 70, "k": 256, "n": 72})
    assert row["bytes"] == 70 * 256 + 256 * 72 / 4 + 4 * 70 * 72 and row["operations"] == 2 * 70 * 256 * 72
    assert row["bound"] == "bytes" and row["bound_us"] == pytest.approx(row["bytes"] * 1e-6)
    assert row["share_of_bound"] == pytest.approx(row["bound_us"] / 15)
    assert (row["cold"]["min_us"], row["cold"]["median_us"], row["hot"]["us"]) == (10, 15, 10)
    # The twenty-second contestant, behind four formats in three types and three of packed codes.
    assert row["cold"]["ratios"]["cuBLAS fp16"]["median"] == pytest.approx(36 / 15)
    assert row["hot"]["ratios"]["cuBLAS fp16"] == pytest.approx(31 / 10)
    packed = next(
        r
        for r in record["rows"]
        if r["what"] == "ternary GEMM of packed codes" and r["shape"] == {"m": 70, "k": 256, "n": 72}
    )
    assert row["bytes"] - packed["bytes"] == 70 * 128 and "ternary" in packed["cold"]["ratios"]
    quantizer = next(r for r in record["rows"] if r["what"] == "HadamardQuantize" and r["shape"]["m"] == 70)
    assert quantizer["bytes"] == 70 * 96 * 5 + 70 * 4 + 4
    assert "M <= 16, ternary and int3, against cuBLAS fp16: at least 4.0 in 0 of 8" in done.stdout
    assert "within 1.3 in 24 of 24" in done.stdout


@pytest.mark.parametrize(("floats", "peer", "other"), [("float16", "fp16", "bf16"), ("bfloat16", "bf16", "fp16")])
def test_halves_stand_beside_halves(whole, floats: str, peer: str, other: str):
    """Half of y's bytes, an error within one rounding to its type; beside cuBLAS in the same type and our float32."""
    _, record = whole
    rows = {row["what"]: row for row in record["rows"] if row["shape"] == {"m": 70, "k": 256, "n": 72}}
    single, half = rows["int3 GEMM"], rows[f"int3 GEMM to {floats}"]
    assert single["bytes"] - half["bytes"] == 2 * 70 * 72
    assert {"int3", f"cuBLAS {peer}"} <= set(half["cold"]["ratios"])
    assert f"cuBLAS {other}" not in half["cold"]["ratios"] and "cuBLAS bf16" not in single["cold"]["ratios"]
    assert half["error_of_its_bound"] > 0.5  # of which the rounding to halves is the most
    x = {row["what"]: row["bytes"] for row in record["rows"] if row["shape"] == {"m": 70, "k": 192}}
    assert x["AdaLnHadamardQuantize"] - x[f"AdaLnHadamardQuantize of {floats}"] == 2 * (70 + 2) * 192


def test_tile_shapes_by_themselves(driver, tmp_path):
    """Each is checked, and launches its own kernel; K of these shapes is too short for slices."""
    out, told = tmp_path / "bench_gpu.json", tmp_path / "launched"
    options = ["--section", "gemm", "--model", "FLUX", "--floats", "float32", "--tactics", "--compile-seconds", "0"]
    done = run([sys.executable, ON_HOST, driver, out, *options], TOLD=str(told))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["what"]: row for row in json.loads(out.read_text())["rows"] if row["shape"]["m"] == 70}
    shapes = ("64x64", "64x64_slice", "128x128")
    kinds = (
        "ternary GEMM",
        "int3 GEMM",
        "int4 GEMM",
        "int8 GEMM",
        *(f"{f} GEMM of packed codes" for f in ("ternary", "int3", "int4")),
    )
    assert set(rows) == {f"{kind}{by}" for kind in kinds for by in ("", *(f" by {shape}" for shape in shapes))}
    assert (
        "int3" in rows["int3 GEMM by 128x128"]["cold"]["ratios"]
        and rows["int3 GEMM by 128x128"]["error_of_its_bound"] < 1
    )
    launched = set(told.read_text().splitlines())
    assert {"2 int3_gemm_64x64", "4 int3_gemm_128x128", "1 int3_gemm_64x64", "3 int3_gemm_64x64"} <= launched
    assert {"2 int3_gemm_64x64_packed", "4 int3_gemm_128x128_packed"} <= launched


def test_a_hopper_has_both_kernels_side_by_side(driver, tmp_path):
    """More than 16 tokens: a row for each format on wgmma, with the other kernels among its baselines."""
    out = tmp_path / "bench_gpu.json"
    options = ["--section", "gemm", "--section", "step", "--compile-seconds", "0", "--model", "FLUX"]
    done = run([sys.executable, ON_HOST, driver, out, *options], D2D_HOST_CAPABILITY="90")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {(row["what"], row["shape"].get("m")): row for row in json.loads(out.read_text())["rows"]}
    kinds = ("", " to float16", " to bfloat16")
    on_wgmma = {f"{fmt} GEMM{to} on wgmma" for fmt in ("ternary", "int3", "int4", "int8") for to in kinds}
    assert {what for what, m in rows if m == 70} - {what for what, m in rows if m == 16} == on_wgmma
    assert "ours on wgmma" in rows["blocks of a step", None]["cold"]["ratios"]
    # Contestants take 10, 20 and 15 us, each by 1 us more than the one before: four formats lie between the two.
    for fmt in ("ternary", "int8"):
        assert rows[f"{fmt} GEMM on wgmma", 70]["cold"]["ratios"][fmt]["median"] < 1
        assert 0 <= rows[f"{fmt} GEMM on wgmma", 70]["error_of_its_bound"] < 1
        assert fmt not in rows[f"{fmt} GEMM", 70]["cold"]["ratios"]


@pytest.mark.parametrize(("op", "section"), [("Int3Gemm", "gemm"), ("ActivationHadamardQuantize", "quantize")])
def test_one_wrong_number_is_seen(driver, tmp_path, op: str, section: str):
    """The section stops, what it had stays, and the exit code is 1."""
    out = tmp_path / "bench_gpu.json"
    done = run([sys.executable, ON_HOST, driver, out, "--section", section], WRONG=op)
    assert done.returncode == 1, done.stdout + done.stderr
    (fault,) = json.loads(out.read_text())["faults"]
    assert fault.startswith(f"{section}: {op}, M 1")


def test_without_a_gpu_there_is_one_error():
    done = run([sys.executable, "tools/bench_gpu.py"], CUDA_VISIBLE_DEVICES="")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: torch sees no NVIDIA GPU here.\n  -> ") and done.stderr.count("\n") == 2


def test_the_tests_for_gpus_pass_on_the_emulated_driver(driver):
    """The library's own calls of the driver: loading, launch arguments, copies. One case of each op and layout."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "tests/ops/test_numerics.py"]
    done = run([*command, "-k", "tails or one-token or step-tail"], LD_LIBRARY_PATH=str(driver.parent))
    assert done.returncode == 0 and " skipped" not in done.stdout, done.stdout[-2000:]
    assert int(done.stdout.split(" passed")[0].split()[-1]) >= 40


CHOICE = """
import ctypes, os, numpy as np
from dit2deploy.base.errors import Failed
from dit2deploy.formats import TERNARY, pack
from dit2deploy.targets import kernel
driver = ctypes.CDLL("libcuda.so.1")
for name in ("d2d_loaded", "d2d_last_launched"):
    getattr(driver, name).restype = ctypes.c_char_p
m, n, k = 17, 32, 64
q = np.arange(m * k).reshape(m, k) % 15 - 7
codes = np.arange(n * k).reshape(n, k) % 3 - 1
words = kernel.relayout("ternary", pack(codes, TERNARY), k, layout=kernel.FRAGMENT_ORDER)
packed = int(os.environ["PACKED"])
given = ((q[:, :32] & 15) + 16 * q[:, 32:] if packed else q).astype(np.int8)
inputs = [given, np.ones((m, 1), np.float32), words, np.ones((n, 1), np.float32), np.zeros(n, np.float32)]
attributes = {"bits": 4, "layout": kernel.FRAGMENT_ORDER, "packed": packed}
try:
    (y,) = kernel.run("TernaryGemm", inputs, attributes, [(m, n)], isa="cuda")
    np.testing.assert_array_equal(y, q @ codes.T)
    print(driver.d2d_loaded().decode() + driver.d2d_last_launched().decode())
except Failed as error:
    print(error.cause)
"""
CHOSEN = {
    72: "TernaryGemm: the CUDA kernels need compute capability 7.5 or later, this GPU has 7.2.",
    75: "sm_75 ternary_gemm_64x64",
    80: "sm_80 ternary_gemm_64x64",
    **dict.fromkeys((86, 89), "sm_86 ternary_gemm_64x64"),
    87: "sm_87 ternary_gemm_64x64",  # Tegra: takes no others' machine code
    90: "sm_90 ternary_gemm_64x64",
    100: "compute_90 ternary_gemm_64x64",
    **dict.fromkeys((120, 121), "sm_120 ternary_gemm_64x64"),
}
# The same where wgmma is asked for.
NEEDED = "TernaryGemm: DIT2DEPLOY_CUDA=wgmma needs compute capability 9.0, this GPU has {}: unset it."
ON_WGMMA = {
    86: NEEDED.format("8.6"),
    90: "sm_90 ternary_gemm_128x128_wgmma",
    100: NEEDED.format("10.0"),
}


def chosen(driver: Path, capability: int, *, packed: bool = False, **environment: str) -> tuple[str, str]:
    """What is printed of the choice, and on stderr."""
    environment |= {
        "PACKED": str(int(packed)),
        "LD_LIBRARY_PATH": str(driver.parent),
        "D2D_HOST_CAPABILITY": str(capability),
    }
    done = run([sys.executable, "-c", CHOICE], **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.rstrip("\n"), done.stderr


def choice(driver: Path, capability: int, *, packed: bool = False, **environment: str) -> str:
    return chosen(driver, capability, packed=packed, **environment)[0]


@pytest.mark.parametrize("capability", CHOSEN)
def test_each_gpu_gets_its_machine_code(driver, capability: int):
    """Later GPUs than those of the machine code get PTX."""
    assert choice(driver, capability) == CHOSEN[capability]


@pytest.mark.parametrize("capability", (75, 90, 120))
def test_every_gpu_has_the_kernels_of_packed_codes(driver, capability: int):
    assert choice(driver, capability, packed=True) == CHOSEN[capability] + "_packed"


def test_a_driver_that_refuses_machine_code_is_given_ptx(driver):
    """As one older than the CUDA 13 that made the code for 12.0. It is told; without PTX it is an error."""
    found, told = chosen(driver, 120, D2D_HOST_REFUSES="sm_120")
    assert found == "compute_90 ternary_gemm_64x64"
    refused = "loading the CUDA kernels: the provided PTX was compiled with an unsupported toolchain"
    assert told.startswith(f"dit2deploy: {refused}. A newer NVIDIA driver") and told.count("\n") == 1
    assert choice(driver, 86, D2D_HOST_REFUSES="sm_86") == f"TernaryGemm: {refused}."


@pytest.mark.parametrize("capability", ON_WGMMA)
def test_wgmma_is_for_one_gpu_and_for_who_asks(driver, capability: int):
    """Machine code of 9.0a, which asks the driver for more shared memory than every launch may have."""
    assert choice(driver, capability, DIT2DEPLOY_CUDA="wgmma") == ON_WGMMA[capability]


LAUNCH = """
import ctypes, numpy as np
from dit2deploy.base.errors import Failed
from dit2deploy.targets import kernel
driver = ctypes.CDLL("libcuda.so.1")
x, qmax = np.ones((3, 8), np.float32), np.ones(1, np.float32)
q, s = np.zeros((3, 8), np.int8), np.zeros((3, 1), np.float32)
memory = lambda value: kernel.Memory(value.ctypes.data, value.dtype, value.shape)
launch = kernel.launcher("HadamardQuantize", [*map(memory, (x, qmax))], {"block": 8}, [*map(memory, (q, s))])
try:
    launch(0)
except Failed as error:
    print(error.cause)
context = ctypes.c_void_p()
driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)
driver.cuCtxSetCurrent(context)
launch(77)
driver.d2d_last_stream.restype = ctypes.c_void_p
print(driver.d2d_last_stream(), *q[2])
"""


def test_a_node_is_enqueued_on_the_callers_stream(driver):
    done = run([sys.executable, "-c", LAUNCH], LD_LIBRARY_PATH=str(driver.parent))
    assert done.returncode == 0, done.stderr
    cause, launched = done.stdout.splitlines()
    assert cause == "HadamardQuantize: no CUDA context is current."
    assert launched == "77 1 0 0 0 0 0 0 0"
