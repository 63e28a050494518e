"""The CUDA kernels that quantize rows, in registers or shared memory: the portable kernel's bits; their mistakes."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from dit2deploy.targets import kernel
from tests.plugins.compiling import HERE, PLUGINS, compile_cpp

# Rows, K, block. In registers: pieces that end in a row, one to eleven warps a row, rows that share a block of threads
# and rows that leave one unfilled; every block. Through shared memory: K no multiple of 4, longer blocks, more warps.
SHAPES = [
    *((5, 96, block) for block in (1, 2, 4, 8, 16, 32)),
    (3, 132, 4),
    (6, 256, 256),
    (5, 1152, 128),
    (4, 1536, 512),
    (5, 3072, 256),
    (3, 4608, 512),
    (2, 16384, 512),
    (3, 90, 2),
    (3, 2048, 1024),
    (2, 24832, 256),
]


OPS = (
    "HadamardQuantize",
    "AdaLnHadamardQuantizeKeep",
    "ActivationHadamardQuantizeKeep",
    "GatedActivationHadamardQuantizeKeep",
)


@pytest.fixture(scope="module")
def host(library: Path) -> Path:
    path = Path(os.environ.get("D2D_TEST_LIBRARIES", library.parent)) / "libdit2deploy_host_cuda.so"
    if not path.is_file():
        pytest.skip(f"{path} was not built")
    return path


@pytest.mark.parametrize("kind", [("absmax", "mid-tread"), ("gaussian", "mid-rise")], ids="-".join)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("m", "k", "block"), SHAPES, ids=lambda value: str(value))
def test_rows_are_the_portable_kernels_bit_for_bit(host, op: str, m: int, k: int, block: int, kind: tuple[str, str]):
    rng = np.random.default_rng(m + k)
    x = rng.standard_normal((m, k), np.float32)
    inputs = [x, np.array([6.5], np.float32)]  # no integer: codes up to 6
    if op.startswith("AdaLn"):
        modulation = [rng.standard_normal((1, k), np.float32) for _ in range(2)]
        inputs[1:1] = [*modulation, np.array([1e-6], np.float32)]
    if op.startswith("Gated"):
        inputs[1:1] = [rng.standard_normal((m, k), np.float32)]
    shapes = [(m, k), (m, 1), (m, k)][: 3 if op.endswith("Keep") else 2]
    attributes = {"block": block, "clip": kind[0], "grid": kind[1]}
    want = kernel.run(op, inputs, attributes, shapes, isa="portable", library=host)
    got = kernel.run(op, inputs, attributes, shapes, isa="cuda_on_host", library=host)
    for name, g, w in zip("qsy", got, want, strict=False):
        np.testing.assert_array_equal(g, w, err_msg=name)


# What is changed in cuda_warp_rows.h, the width of a row, and what the emulator says to it.
PLANTED = {
    "none": ("", "", 3072, ""),
    "partial sums are read too soon": (
        "w.warp, value);\n    gpu::sync_block();",
        "w.warp, value);",
        3072,
        "nobody wrote",
    ),
    "the next sums overwrite these": (
        "    gpu::sync_block();\n    return value;",
        "    return value;",
        3072,
        "a barrier is",
    ),
    "rows beyond the last one are stored": ("row < m, first", "true, first", 96, "changes (a barrier is missing)"),
    "rows beyond the last one are read": ("row < m ? row : m - 1", "row", 96, "outside of every tensor"),
    "pieces beyond the row": ("4 * kLanes * j < lane_left", "4 * kLanes * j < left", 96, "touches global memory"),
    "a warp leaves a shuffle": ("if (w.any_has(j))", "if (w.has(j))", 96, "different warp operations"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_the_emulator_finds_what_is_planted_in_the_kernel(tmp_path, emulator, name: str):
    old, new, k, report = PLANTED[name]
    folder = PLUGINS / "ops"
    rows = (folder / "hadamard_quantize" / "cuda_warp_rows.h").read_text()
    assert old in rows
    (tmp_path / "cuda_warp_rows.h").write_text(rows.replace(old, new, 1))
    sources = [folder / "ada_ln_hadamard_quantize" / "cuda.cu", HERE / "some_rows.cc"]
    options = ["-O1", "-Wno-unknown-pragmas", "-Wno-unused-variable", "-Wno-unused-function", str(emulator)]
    options += [f"-I{tmp_path}", f"-I{folder / 'hadamard_quantize'}"]  # the changed one is found first
    folders = ("base", "cuda", "cuda_on_host")
    program = compile_cpp(tmp_path / "some_rows", sources, *options, folders=folders)
    done = subprocess.run([program, str(k)], capture_output=True, text=True, timeout=120)
    if not report:
        assert (done.returncode, done.stdout) == (0, ""), done.stdout
    else:
        assert done.returncode == 1 and report in done.stdout, done.stdout
