"""The CPU kernels of all instruction sets compute the same bits as the portable ones, at the borders of their blocking.

What they should compute is tests/ops/test_numerics.py's affair. Here: sums at the edge of int16, K that ends inside of
a block or a quad, groups that end inside of a chunk, tails of tokens and outputs, weights at odd addresses, threads.
"""

import functools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from dit2deploy.formats import FORMATS, INT8, TERNARY, Format, pack
from dit2deploy.targets import kernel
from tests import over_pipe

EMULATED = "libdit2deploy_emulated.so"
# (M, K, N, G): tokens beside 6 and 12, K beside 4, 20480 / 64 quads and half of them (a quarter, where 4 tiles are read
# at once), N beside 16 and 64.
SHAPES = (
    (1, 1, 1, 1),
    (5, 3, 17, 1),
    (6, 640, 16, 1),
    (7, 643, 31, 1),
    (11, 1280, 64, 1),
    (12, 1281, 65, 1),
    (13, 1284, 33, 1),
    (14, 648, 144, 1),
    (25, 2601, 15, 1),
    (7, 96, 20, 8),
    (9, 60, 18, 5),
    (4, 45, 17, 9),
    (13, 2600, 18, 2),
)
# Look-ups take whole steps of 128 or 256 outputs, or most of 128; blocks of 128 or 256 k's and chunks of 16; 16 to 128
# tokens a task, of which 4 or all have tables at once.
LOOKUP_SHAPES = (
    (1, 16, 86, 1),
    (2, 83, 128, 1),
    (67, 300, 200, 1),
    (131, 272, 640, 1),
    (129, 96, 384, 2),
    (5, 528, 128, 11),
    (3, 4800, 100, 1),
    (2, 9376, 90, 2),
)
# Both sides of what changes with max |q|: 21 look-ups (AVX2), 31 pairs of int16 beside int8 (AVX2) and look-ups (VBMI).
LARGEST = (0, 1, 3, 7, 15, 21, 22, 31, 32, 128)


# The emulated avx2 has byte dot products.
HERE = ("avx2", "avx512_vnni", "neon", "emulated avx2", "emulated avx512_vnni")


@pytest.fixture(params=(*HERE, *(f"neon of {cpu}" for cpu in over_pipe.CPUS)))
def face(request, library: Path) -> Callable[..., list[np.ndarray]]:
    """What runs a node by an instruction set: kernel.run without `isa` and `library`."""
    if request.param.startswith("neon of "):
        return functools.partial(over_pipe.run, request.param.removeprefix("neon of "), isa="neon")
    isa = request.param.split()[-1]
    if request.param != isa:
        library = Path(os.environ.get("D2D_TEST_LIBRARIES", library.parent)) / EMULATED
        if not library.is_file():
            pytest.skip(f"{library} was not built")
    if isa not in kernel.isas(library=library):
        pytest.skip(f"{library.name} does not run {isa} here")
    return functools.partial(kernel.run, isa=isa, library=library)


@pytest.fixture
def oracle(library: Path) -> Callable[..., list[np.ndarray]]:
    """The portable kernels, as `face`."""
    return functools.partial(kernel.run, isa="portable", library=library)


def at_odd_address(array: np.ndarray) -> np.ndarray:
    """A copy at an address that is a multiple of 4, but of nothing more, as weights in a mapped file may be."""
    room = np.empty(array.size + 16, array.dtype)
    start = 1 + (-(room.ctypes.data // 4)) % 16
    view = room[start : start + array.size].reshape(array.shape)
    view[...] = array
    assert view.ctypes.data % 8 == 4
    return view


def gemm_inputs(
    fmt: Format,
    largest: int,
    m: int,
    k: int,
    n: int,
    groups: int,
    *,
    fill: str,
    rank: int,
    gates: int = 0,
    library: Path,
) -> list[np.ndarray]:
    rng = np.random.default_rng(m * k + n)
    low, high = -fmt.offset, fmt.levels - 1 - fmt.offset
    q = rng.integers(-largest, min(largest, 127), (m, k), endpoint=True)
    codes = rng.integers(low, high, (n, k), endpoint=True)
    if fill == "largest":
        q[:], codes[:] = min(largest, 127), high
    elif fill == "smallest":
        q[:], codes[:] = -largest, low
    elif fill == "opposite":
        q[:], codes[:] = min(largest, 127), low
    inputs = [
        q.astype(np.int8),
        rng.uniform(0.01, 0.1, (m, 1)).astype(np.float32),
        at_odd_address(kernel.relayout(fmt.name, pack(codes, fmt), k, library=library)),
        rng.uniform(0.01, 0.1, (n, groups)).astype(np.float32),
        rng.standard_normal(n, np.float32),
    ]
    if rank:
        inputs += [rng.standard_normal((m, rank), np.float32), rng.standard_normal((n, rank), np.float32)]
    if gates:
        inputs += [rng.standard_normal((m, n), np.float32), rng.standard_normal((gates, n), np.float32)]
    return inputs


def gemm(
    run: Callable[..., list[np.ndarray]], fmt: Format, inputs: list[np.ndarray], bits: int, threads: int = 1
) -> np.ndarray:
    shape = (inputs[0].shape[0], inputs[3].shape[0])
    name = f"{fmt.title}Gemm"
    if len(inputs) > 5:
        joined = inputs[-2].shape == shape  # else it is t [M, 3], whose rank no N here is
        name += ("LowRank" if len(inputs) > 7 or not joined else "") + ("Residual" if joined else "")
    attributes = {"bits": bits, "layout": 1}
    return run(name, inputs, attributes, [shape], threads=threads)[0]


@pytest.mark.parametrize("fill", ("random", "largest", "smallest", "opposite"))
@pytest.mark.parametrize("bits", (2, 4, 7, 8))
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_gemms_agree_bit_for_bit(face, oracle, library: Path, fmt: Format, bits: int, fill: str):
    for index, (m, k, n, groups) in enumerate(SHAPES):
        rank, gates = (0, 3)[index % 2], (0, 1, m)[index % 3]
        largest = 2 ** (bits - 1) - 1
        inputs = gemm_inputs(fmt, largest, m, k, n, groups, fill=fill, rank=rank, gates=gates, library=library)
        got = gemm(face, fmt, inputs, bits, threads=1 + index % 3)
        want = gemm(oracle, fmt, inputs, bits)
        np.testing.assert_array_equal(got.view(np.int32), want.view(np.int32), err_msg=str((m, k, n, groups)))


@pytest.mark.parametrize("fill", ("random", "largest", "opposite"))
@pytest.mark.parametrize("largest", LARGEST)
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_codes_narrower_than_bits_agree_bit_for_bit(face, oracle, library: Path, fmt: Format, largest: int, fill: str):
    """`bits` bounds the codes, kernels choose by those of the call. All at the edge: sums as large as can be."""
    for index, (m, k, n, groups) in enumerate(LOOKUP_SHAPES):
        rank, gates = (0, 3)[index % 2], (m, 0, 1)[index % 3]
        inputs = gemm_inputs(fmt, largest, m, k, n, groups, fill=fill, rank=rank, gates=gates, library=library)
        got = gemm(face, fmt, inputs, 8, threads=1 + index % 3)
        want = gemm(oracle, fmt, inputs, 8)
        np.testing.assert_array_equal(got.view(np.int32), want.view(np.int32), err_msg=str((m, k, n, groups)))


@pytest.mark.parametrize("face", HERE, indirect=True)
@pytest.mark.parametrize("fmt", (TERNARY, INT8), ids=lambda fmt: fmt.name)
def test_gemms_run_side_by_side(face, oracle, library: Path, fmt: Format):
    """Sessions share the threads of one process: memory of a thread must not mix them up."""
    shapes = ((13, 700, 33, 1), (7, 1301, 18, 1), (19, 400, 128, 1), (35, 1000, 96, 1))
    problems = [
        gemm_inputs(fmt, largest, *shape, fill="random", rank=0, library=library)
        for shape, largest in zip(shapes, (127, 127, 7, 3), strict=True)
    ]
    want = [gemm(oracle, fmt, inputs, 8) for inputs in problems]
    wrong: list[int] = []

    def many(index: int) -> None:
        for _ in range(20):
            got = gemm(face, fmt, problems[index], 8, threads=2)
            if not np.array_equal(got, want[index]):
                wrong.append(index)

    workers = [threading.Thread(target=many, args=(index,)) for index in range(len(shapes))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def rotations() -> Iterator[tuple[int, int]]:
    """(K, block): every number of vectors that a stage joins, and K that is no multiple of a vector."""
    yield from ((77, 1), (40, 4), (96, 2), (24, 8), (16, 16), (96, 32), (192, 64), (1152, 128), (768, 256))
    yield from ((1536, 512), (1024, 1024), (8192, 4096), (32768, 32768))


@pytest.mark.parametrize("grid", ("mid-tread", "mid-rise"))
@pytest.mark.parametrize("clip", ("absmax", "gaussian"))
@pytest.mark.parametrize(("k", "block"), rotations())
def test_quantizers_agree_bit_for_bit(face, oracle, library: Path, k: int, block: int, clip: str, grid: str):
    rng = np.random.default_rng(k + block)
    x = rng.standard_normal((18, k), np.float32) * 10 ** rng.uniform(-3, 3, (18, 1)).astype(np.float32)
    x[1], x[2] = 0, 1e-38
    x[3, k // 2], x[4, 0], x[5, -1] = np.nan, np.inf, 3e38
    x[6] = np.arange(k) % 16 - 7.5  # without a rotation: halves, which go to the even neighbour
    qmax = np.array([1, 3, 7.5, 7, 15, 127], np.float32)
    attributes = {"block": block, "clip": clip, "grid": grid}
    (q, s), (want_q, want_s) = (
        run("HadamardQuantize", [x, qmax], attributes, [(18, k), (18, 1)], threads=2) for run in (face, oracle)
    )
    np.testing.assert_array_equal(q, want_q)
    np.testing.assert_array_equal(s, want_s)
    assert np.isnan(s[3:5]).all() and not q[1:5].any() and s[1] == 0
