"""The GEMMs' CUDA kernels: the order of their weights by its definition, the large tiles, and their own mistakes."""

import numpy as np
import pytest

from dit2deploy.formats import FORMATS, TERNARY, Format
from dit2deploy.targets import kernel
from tests.plugins.gemms import Planted, changed, in_fragments, judge, on_host, weights_of

BITS = {"ternary": 2, "int3": 3, "int4": 4, "int8": 8}


def registers(fmt: Format, words: np.ndarray) -> np.ndarray:
    """What a warp unpacks from a unit: uint32 [32 lanes, 4 tiles, 4 registers], by the words' definition."""
    v = 2 if fmt.name == "int3" else 4
    lanes = words.view(np.uint32).reshape(-1, 32, v).transpose(1, 0, 2).reshape(32, -1)
    w = [lanes[:, i].astype(np.uint64) for i in range(lanes.shape[1])]
    out = np.zeros((32, 4, 4), np.uint64)
    for tile, reg in np.ndindex(4, 4):
        if fmt.name == "ternary":
            found = w[tile] << np.uint64(6 - 2 * reg) & 0xC0C0C0C0
        elif fmt.name == "int4":
            found = w[2 * tile + reg % 2] << np.uint64(4 - 4 * (reg // 2)) & 0xF0F0F0F0
        elif fmt.name == "int8":
            found = w[4 * tile + reg]
        else:
            a, b, c = w[3 * (tile // 2) : 3 * (tile // 2) + 3]
            index = 4 * (tile % 2) + (0, 3, 2, 1)[reg]
            two, one = np.uint64(0xC0C0C0C0), np.uint64(0x20202020)
            found = (
                *(x & 0xE0E0E0E0 for x in (a, b, c)),
                *(x << np.uint64(3) & 0xE0E0E0E0 for x in (a, b, c)),
                (a << np.uint64(6) & two) | (b << np.uint64(5) & one),
                (c << np.uint64(6) & two) | (b << np.uint64(4) & one),
            )[index]
        out[:, tile, reg] = found
    return out.astype(np.uint32)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_a_unit_unpacks_to_the_fragments_of_mma(fmt: Format, library):
    """Byte e of register r of lane (g, t) is W[8 tile + g, 16 r + 4 t + e] at the top of the byte."""
    weights = weights_of(fmt, 64, 128)
    words = in_fragments(fmt, weights, library).reshape(2, 2, -1)
    for strip, unit in np.ndindex(2, 2):
        got = np.ascontiguousarray(registers(fmt, words[strip, unit])).view(np.int8)  # [lanes, tiles, 4 registers x 4]
        lane, tile, place = np.indices(got.shape)
        row = 32 * strip + 8 * tile + lane // 4
        column = 64 * unit + 16 * (place // 4) + 4 * (lane % 4) + place % 4
        np.testing.assert_array_equal(got, weights[row, column] << (8 - BITS[fmt.name]))


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_the_order_is_a_bijection(fmt: Format, library):
    """Whole units hold no bit beside the weights', and every bit of a weight is one bit of the words, its own."""
    bits, n, k = BITS[fmt.name], 32, 64
    assert in_fragments(fmt, weights_of(fmt, n, k), library).size * 32 == n * k * bits
    zero = in_fragments(fmt, np.zeros((n, k), int), library).view(np.uint32)
    assert not zero.any()
    used = np.zeros_like(zero)
    for row, column in ((row, column) for row in range(0, n, 5) for column in range(k)):
        weights = np.zeros((n, k), int)
        weights[row, column] = -1  # all bits set
        one = in_fragments(fmt, weights, library).view(np.uint32)
        assert np.unpackbits(one.view(np.uint8)).sum() == bits and not (used & one).any()
        used |= one


@pytest.mark.parametrize(("n", "k"), [(1, 1), (33, 65), (70, 208)])
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_padding_is_weights_of_zero(fmt: Format, n: int, k: int, library):
    weights = weights_of(fmt, n, k)
    rows, columns = -(-n // 32) * 32, -(-k // 64) * 64
    padded = np.zeros((rows, columns), int)
    padded[:n, :k] = weights
    np.testing.assert_array_equal(in_fragments(fmt, weights, library), in_fragments(fmt, padded, library))


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_large_tiles_are_exact(fmt: Format, library):
    """16 x 8 blocks of 128 x 128, tokens, outputs and K ragged: the plan's rule for them."""
    host = on_host(library)
    m, n, k = 16 * 128 - 37, 8 * 128 - 9, 80
    rng = np.random.default_rng(0)
    q = rng.integers(-127, 127, (m, k), endpoint=True).astype(np.int8)
    weights = weights_of(fmt, n, k)
    inputs = [q, np.ones((m, 1), np.float32), in_fragments(fmt, weights, library)]
    inputs += [np.ones((n, 1), np.float32), np.zeros(n, np.float32)]
    attributes = {"bits": 8, "layout": kernel.FRAGMENT_ORDER}
    (y,) = kernel.run(f"{fmt.title}Gemm", inputs, attributes, [(m, n)], isa="cuda_on_host", threads=1, library=host)
    np.testing.assert_array_equal(y, q.astype(int) @ weights.T)


@pytest.mark.parametrize("bytes_off", [0, 4, 8])
def test_a_result_that_lies_between_two_elements_is_written_too(bytes_off: int, library, monkeypatch):
    """Tiles store two elements at once: y at an odd address, as a view of another tensor may have, goes without them.
    The emulator refuses accesses that are not aligned."""
    host = on_host(library)
    m, n, k = 17, 64, 128
    q = np.random.default_rng(0).integers(-7, 7, (m, k), endpoint=True).astype(np.int8)
    weights = weights_of(TERNARY, n, k)
    inputs = [q, np.ones((m, 1), np.float32), in_fragments(TERNARY, weights, library)]
    inputs += [np.ones((n, 1), np.float32), np.zeros(n, np.float32)]
    held: list[np.ndarray] = []

    def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        held.append(np.zeros(4 * m * n + 128, np.uint8))
        begin = -held[0].ctypes.data % 64 + bytes_off
        return held[0][begin : begin + 4 * m * n].view(dtype).reshape(shape)

    monkeypatch.setattr(kernel.np, "empty", empty)
    attributes = {"bits": 4, "layout": kernel.FRAGMENT_ORDER}
    (y,) = kernel.run("TernaryGemm", inputs, attributes, [(m, n)], isa="cuda_on_host", library=host)
    monkeypatch.undo()
    np.testing.assert_array_equal(y, q.astype(int) @ weights.T)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_a_split_k_gives_the_bits_of_its_formula(fmt: Format, library):
    """65 steps in 4 slices, the plan's rule: float32 in the order of the kernel that does not split."""
    m, n, k = 17, 33, 64 * 64 + 16
    rng = np.random.default_rng(0)
    q = rng.integers(-127, 127, (m, k), endpoint=True).astype(np.int8)
    weights = weights_of(fmt, n, k)
    s, ws = rng.uniform(0.01, 0.1, (m, 1)).astype(np.float32), rng.uniform(0.01, 0.1, (n, 1)).astype(np.float32)
    bias = rng.standard_normal(n).astype(np.float32)
    inputs = [q, s, in_fragments(fmt, weights, library), ws, bias]
    attributes = {"bits": 8, "layout": kernel.FRAGMENT_ORDER}
    host = on_host(library)
    (y,) = kernel.run(f"{fmt.title}Gemm", inputs, attributes, [(m, n)], isa="cuda_on_host", threads=1, library=host)
    sums = (q.astype(np.int64) @ weights.T).astype(np.float32)
    np.testing.assert_array_equal(y, sums * ws.T * s + bias)


BARRIER = "        gpu::sync_block();\n        copies.fetch("
BRANCH = "        gpu::sync_block();\n#pragma unroll 1\n        for (int i = (int)"
ADD = "gpu::add(static_cast<int*>(p.y) + (int64_t)token * p.n + output, sum);"
STORE = "gpu::store(static_cast<int*>(p.y) + (int64_t)token * p.n + output, sum);"
FINISHED = "    store_element(p.y, at, p.dtype, stream_of(p, token).joined(output, value));\n"
# What is changed in the kernels' sources, whole or in how many slices K is, and what the emulator says to it.
PLANTED = {
    "none": ("", "", 0, ""),
    "wait one too weak": ("copy_async_wait<T::stages - 2>", "copy_async_wait<T::stages - 1>", 0, "was not waited for"),
    "no barrier a step": (BARRIER, BARRIER.partition("\n")[2], 0, "nobody wrote"),
    "the stage that is read is overwritten": ("fetch(memory, stage_before", "fetch(memory, stage", 0, "copy_async"),
    "K beyond the row": ("inside && there[i]", "there[i]", 0, "outside of every tensor"),
    "outputs beyond N": ("if (token >= p.m || output >= p.n)", "if (token >= p.m)", 0, "touches global memory"),
    "another token's residual": ("stream_of(p, token);", "stream_of(p, token ^ 1);", 0, " is "),
    "no barrier before the branch": (BRANCH, BRANCH.partition("\n")[2], 0, "a barrier is missing"),
    "none, in slices": ("", "", 3, ""),
    "a slice stores its sums": (ADD, STORE, 3, "another block of the launch changes"),
    "a slice begins a step early": ("        step = (int)(all", "        step = -1 + (int)(all", 2, "outside of every"),
    "the last step is left out": ("gpu::block_z() + 1) /", "gpu::block_z() + 1) / 2 /", 3, " is "),
    "weights of the first slice": ("all_steps + step) * W::pieces", "all_steps) * W::pieces", 3, " is "),
    "activations of the first slice": ("row_bytes + row_step * step + 16", "row_bytes + 16", 3, " is "),
    "sums are not set to 0": ("if (i < count) gpu::store(sums + i, 0);", "", 3, " is "),
    "sums are not finished": (FINISHED, "", 3, " is "),
}


KERNELS = """
GPU_KERNEL_OF(128, 4, ternary_gemm_64x64, PORTS) { tile_gemm<0, 2, 2, 2, Of::whole>(GIVEN); }
GPU_KERNEL_OF(128, 4, ternary_gemm_64x64_slice, PORTS) { tile_gemm<0, 2, 2, 2, Of::slice>(GIVEN); }
"""


@pytest.fixture(scope="module")
def planted(tmp_path_factory, emulator) -> Planted:
    return Planted(tmp_path_factory.mktemp("same"), emulator)


@pytest.mark.parametrize("name", PLANTED)
def test_the_emulator_finds_what_is_planted_in_the_kernel(planted, library, tmp_path, name: str):
    old, new, slices, report = PLANTED[name]
    sources = changed(("cuda_tiles.h", "cuda.cu"), old, new)
    source = sources["cuda.cu"]
    first, last = source.index("#define QUANT_GEMM"), source.index("GPU_KERNEL_OF(kFinishThreads")
    sources["cuda.cu"] = source[:first] + KERNELS + source[last:]
    judge(*planted.run(tmp_path, sources, str(slices or "whole"), 208, library), report)
