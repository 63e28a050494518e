"""The CUDA kernels on the emulator under the address and undefined-behaviour sanitizers, the GEMMs among them.

They see what the emulator's own checks do not: accesses by plain pointers, arithmetic that is not defined, the emulator
itself. (Not the thread sanitizer: the threads of a block are fibers of one thread, and who may touch what between
barriers is the emulator's own check.)
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dit2deploy.formats import FORMATS, INT3, pack
from dit2deploy.ops import HADAMARD_QUANTIZE, OPS
from dit2deploy.ops.op import Case, Op
from dit2deploy.targets import kernel
from tests.packed import columns_of, in_packed_codes
from tests.plugins.compiling import PLUGINS, compile_cpp

ROOT = Path(__file__).resolve().parents[2]
# Of the GEMMs' cases: any, tiles, tiles of groups, few tokens, few tokens of groups, slices of K.
GEMM_CASES = {
    "tails": kernel.INTERCHANGE,
    "step-tail": kernel.FRAGMENT_ORDER,
    "many-groups": kernel.FRAGMENT_ORDER,
    "one-token": kernel.FRAGMENT_ORDER,
    "groups": kernel.FRAGMENT_ORDER,
    "groups-of-units": kernel.FRAGMENT_ORDER,
    "long-k": kernel.FRAGMENT_ORDER,
}
# Of the plain GEMMs', packed: tiles, tiles of groups, few tokens, slices of K.
PACKED_CASES = ("bits4", "groups-of-units", "one-token", "long-runs")
WGMMA_CASE = "step-tail"
PLAIN = {"q", "s", "w", "ws", "bias"}
# Of the ops that quantize rows: in registers, and through shared memory; of the others the first ones.
ROW_CASES = ("extremes-absmax", "row-qmax-gaussian", "odd-k-absmax", "odd-k-gaussian-mid-rise")
FIRST = 3
# Runs nodes of files with numpy alone, in a process whose allocator is the sanitizer's.
PROGRAM = """
import ctypes, importlib.util, json, os, sys
from pathlib import Path
import numpy as np
spec = importlib.util.spec_from_file_location("d2d_kernel", "dit2deploy/targets/kernel.py")
kernel = importlib.util.module_from_spec(spec)
sys.modules["d2d_kernel"] = kernel
spec.loader.exec_module(kernel)
library = Path(sys.argv[1])
for path in sorted(Path(sys.argv[2]).glob("*.npz")):
    held = np.load(path)
    node = json.loads(str(held["node"]))
    inputs = [held[f"input{i}"] for i in range(node["inputs"])]
    shapes = [tuple(shape) for shape in node["shapes"]]
    print(node["op"], node["case"], flush=True)
    os.environ.update(node["environment"])
    got = kernel.run(node["op"], inputs, node["attributes"], shapes, isa="cuda_on_host", library=library)
    for i, value in enumerate(got):
        np.testing.assert_array_equal(value, held[f"output{i}"])
names = ctypes.CDLL(str(library)).d2d_never_launched
names.restype = ctypes.c_char_p
print("never launched:", names().decode())
"""


@pytest.fixture(scope="module")
def sanitized(library: Path) -> tuple[Path, dict[str, str]]:
    """The library, and the environment that a program needs to load it."""
    path = Path(os.environ.get("D2D_TEST_LIBRARIES", library.parent)) / "libdit2deploy_sanitized_cuda.so"
    compiler = shutil.which("g++")
    if not path.is_file() or compiler is None:
        pytest.skip(f"{path} was not built")
    command = [compiler, "-print-file-name=libasan.so"]
    runtime = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    options = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1", "LD_PRELOAD": runtime}
    return path, {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **options}


# Left out for time: of the large tiles one format runs, 128 blocks that the plan asks for. The others' unpacking is
# that of their small tiles; wide blocks on wgmma are narrow ones with more warps.
LARGE = INT3
LEFT_OUT = {f"{fmt.name}_gemm_128x128" for fmt in FORMATS if fmt is not LARGE}
LEFT_OUT |= {f"{fmt.name}_gemm_128x128_packed" for fmt in FORMATS if fmt.name != "int8"}
LEFT_OUT |= {f"{fmt.name}_gemm_128x256_wgmma" for fmt in FORMATS}


def large_tiles() -> tuple[Op, Case]:
    """16 x 8 blocks of 128 x 128, both ragged, one step of K."""
    rng = np.random.default_rng(0)
    m, n, k = 15 * 128 + 1, 7 * 128 + 3, 16
    inputs = {
        "q": rng.integers(-127, 127, (m, k), endpoint=True).astype(np.int8),
        "s": np.ones((m, 1), np.float32),
        "w": pack(rng.integers(LARGE.low, LARGE.high, (n, k), endpoint=True), LARGE),
        "ws": np.ones((n, 1), np.float32),
        "bias": np.zeros(n, np.float32),
    }
    return next(op for op in OPS if op.name == f"{LARGE.title}Gemm"), Case("large", inputs, {"bits": 8})


def packed_rows() -> Case:
    """Through shared memory, in two tiles."""
    x = np.random.default_rng(0).standard_normal((2, 2048), np.float32)
    return Case("packed-tiles", {"x": x, "qmax": np.array([7], np.float32)}, {"block": 1024, "packed": 1})


def nodes() -> Iterator[tuple[Op, Case, int, bool]]:
    """An op, its case, the layout of its weights, and whether it runs on wgmma."""
    for op in OPS:
        if not op.native:
            continue
        if "w" in (port.name for port in op.inputs):
            for case in op.cases():
                if case.name in GEMM_CASES:
                    yield op, case, GEMM_CASES[case.name], False
                if case.name == WGMMA_CASE:
                    yield op, case, kernel.FRAGMENT_ORDER, True
                packed = in_packed_codes(op, case)
                if packed and case.name in PACKED_CASES and set(case.inputs) == PLAIN:
                    yield op, packed, kernel.FRAGMENT_ORDER, False
        else:
            named = [case for case in op.cases() if case.name in ROW_CASES]
            for case in named or op.cases()[:FIRST]:
                yield op, case, kernel.INTERCHANGE, False
    yield HADAMARD_QUANTIZE, packed_rows(), kernel.INTERCHANGE, False
    yield *large_tiles(), kernel.FRAGMENT_ORDER, False


def environment_of(wgmma: bool) -> dict[str, str]:
    return {"DIT2DEPLOY_CUDA": "wgmma" if wgmma else "mma", "D2D_HOST_CAPABILITY": "90" if wgmma else "80"}


def write(folder: Path, library: Path, patch: pytest.MonkeyPatch) -> int:
    """A file for each node: inputs, what the same kernel gave without sanitizers, and what to call."""
    host = library.parent / "libdit2deploy_host_cuda.so"
    written = 0
    for op, case, layout, wgmma in nodes():
        inputs = [case.inputs[port.name] for port in op.inputs]
        attributes = {**op.attributes, **case.attributes}
        shapes = op.output_shapes([value.shape for value in inputs], attributes)
        if layout != kernel.INTERCHANGE:
            fmt = next(fmt for fmt in FORMATS if op.name.startswith(fmt.title))
            inputs[2] = kernel.relayout(fmt.name, inputs[2], columns_of(case), layout=layout, library=host)
            attributes["layout"] = layout
        environment = environment_of(wgmma)
        for name, value in environment.items():
            patch.setenv(name, value)
        outputs = kernel.run(op.name, inputs, attributes, shapes, isa="cuda_on_host", library=host)
        node = {"op": op.name, "case": case.name, "inputs": len(inputs), "shapes": shapes, "attributes": attributes}
        node["environment"] = environment
        arrays = {f"input{i}": value for i, value in enumerate(inputs)}
        arrays |= {f"output{i}": value for i, value in enumerate(outputs)}
        np.savez(folder / f"{written:03}.npz", node=json.dumps(node), **arrays)
        written += 1
    return written


def test_the_kernels_run_clean_under_the_sanitizers(sanitized, tmp_path, monkeypatch):
    path, environment = sanitized
    count = write(tmp_path, path, monkeypatch)
    command = [sys.executable, "-c", PROGRAM, path, tmp_path]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
    *launched, last = done.stdout.splitlines()
    assert set(last.removeprefix("never launched: ").split()) == LEFT_OUT and len(launched) == count


@pytest.mark.parametrize(
    ("old", "new", "report"),
    [
        ("q_low[row * k + i] = ", "q_low[row * k + i + 1] = ", "heap-buffer-overflow"),
        ("(int8_t)(below ? code", "(int8_t)(1 << (int)(31 + me)) + (int8_t)(below ? code", "shift exponent"),
    ],
    ids=("beyond a tensor", "undefined shift"),
)
def test_the_sanitizers_see_what_is_planted_in_a_kernel(sanitized, tmp_path, old: str, new: str, report: str):
    """A plain pointer beyond its tensor, and a shift that is not defined: the emulator alone sees neither."""
    source = (PLUGINS / "ops" / "multi_region_quantize" / "cuda.cu").read_text()
    assert old in source
    (tmp_path / "cuda.cu").write_text(source.replace(old, new))
    main = tmp_path / "main.cc"
    main.write_text(MAIN)
    sources = [tmp_path / "cuda.cu", main, PLUGINS / "cuda_on_host" / "emulator.cc"]
    options = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-Wno-unused-variable")
    program = compile_cpp(tmp_path / "rows", sources, *options, folders=("base", "cuda", "cuda_on_host"))
    done = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and report in done.stderr, done.stdout + done.stderr


MAIN = """
#include <cstdio>
#include <vector>
#include "emulator.h"
int main() {
    const size_t m = 2, k = 40;
    std::vector<float> x(m * k, 1), qmax(1, 7), regions = {0, 1, 1}, s(2 * m);
    std::vector<int8_t> low(m * k), high(m * k);
    const auto word = [](const auto& v) { return reinterpret_cast<uint64_t>(v.data()); };
    gpu::host::Grid grid{{m, 1, 1}, {128, 1, 1}, 0, 0, {{x.data(), 4 * x.size()}}};
    gpu::host::launch("multi_region_quantize", grid,
                      {word(x), word(qmax), word(regions), word(low), word(high), word(s), word(s) + 4 * m, k, m, 1});
}
"""
