"""The GEMMs on wgmma, emulated: the bits of the kernels that they stand in for, the choice, and their own mistakes."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from dit2deploy.base.errors import Failed
from dit2deploy.formats import FORMATS, INT4, Format
from dit2deploy.targets import kernel
from tests.plugins.compiling import PLUGINS, compile_cpp
from tests.plugins.gemms import FOLDERS, Planted, changed, in_fragments, judge, never_launched, on_host, weights_of

CHOICE, CAPABILITY = "DIT2DEPLOY_CUDA", "D2D_HOST_CAPABILITY"
VARIANTS = ("Gemm", "GemmLowRank", "GemmResidual", "GemmLowRankResidual")
# (M, N, K): ragged within tiles, more tiles than one, a step of K that is not whole, fewer steps than stages and more.
SHAPES = ((17, 33, 16), (130, 131, 208), (257, 129, 64), (70, 300, 10 * 64 + 48))
RANK, SAMPLES = 5, 1


@pytest.fixture
def host(library, tmp_path) -> Path:
    """The emulated library, which has launched nothing yet."""
    return Path(shutil.copy(on_host(library), tmp_path))


def inputs_of(fmt: Format, variant: str, m: int, n: int, k: int, library: Path) -> list[np.ndarray]:
    """Random, with the extremes of codes and weights in the first token and output."""
    rng = np.random.default_rng(m + n + k)
    q = rng.integers(-127, 127, (m, k), endpoint=True).astype(np.int8)
    weights = weights_of(fmt, n, k)
    q[0], weights[0] = -127, -fmt.offset
    s, ws = rng.uniform(0.01, 0.1, (m, 1)), rng.uniform(0.01, 0.1, (n, 1))
    inputs = [q, s, in_fragments(fmt, weights, library), ws, rng.standard_normal(n)]
    if "LowRank" in variant:
        inputs += [rng.standard_normal((m, RANK)), rng.standard_normal((n, RANK))]
    if "Residual" in variant:
        inputs += [rng.standard_normal((m, n)), rng.standard_normal((SAMPLES, n))]
    return [value.astype(np.float32) if value.dtype == np.float64 else value for value in inputs]


def run(host: Path, op: str, inputs: list[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    attributes = {"bits": 8, "layout": kernel.FRAGMENT_ORDER}
    return kernel.run(op, inputs, attributes, [shape], isa="cuda_on_host", threads=1, library=host)[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_wgmma_gives_the_bits_of_mma(fmt: Format, variant: str, shape: tuple[int, int, int], host, monkeypatch):
    m, n, k = shape
    op, inputs = f"{fmt.title}{variant}", inputs_of(fmt, variant, m, n, k, host)
    monkeypatch.setenv(CAPABILITY, "90")
    want = run(host, op, inputs, (m, n))
    name = f"{fmt.name}_gemm_128x128_wgmma"
    assert name in never_launched(host)
    monkeypatch.setenv(CHOICE, "wgmma")
    np.testing.assert_array_equal(run(host, op, inputs, (m, n)), want)
    assert name not in never_launched(host)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_the_largest_sums_fit(fmt: Format, host, monkeypatch):
    """The most negative weight and code over the longest K of a FLUX layer; weights stand at the top of their bytes."""
    m, n, k = 17, 40, 12288
    weights = np.full((n, k), -fmt.offset)
    inputs = [np.full((m, k), -127, np.int8), np.ones((m, 1), np.float32), in_fragments(fmt, weights, host)]
    inputs += [np.ones((n, 1), np.float32), np.zeros(n, np.float32)]
    monkeypatch.setenv(CAPABILITY, "90")
    monkeypatch.setenv(CHOICE, "wgmma")
    np.testing.assert_array_equal(run(host, f"{fmt.title}Gemm", inputs, (m, n)), np.float32(127 * k * fmt.offset))


def test_many_blocks_are_wide_ones(host, monkeypatch):
    """16 x 8 blocks of 128 x 256, tokens, outputs and K ragged: the plan's rule for them."""
    m, n, k = 16 * 128 - 37, 8 * 256 - 9, 80
    inputs = inputs_of(INT4, "Gemm", m, n, k, host)
    inputs[1][:], inputs[3][:], inputs[4][:] = 1, 1, 0
    monkeypatch.setenv(CAPABILITY, "90")
    monkeypatch.setenv(CHOICE, "wgmma")
    weights = weights_of(INT4, n, k)
    weights[0] = -INT4.offset
    np.testing.assert_array_equal(run(host, "Int4Gemm", inputs, (m, n)), inputs[0].astype(int) @ weights.T)
    assert "int4_gemm_128x256_wgmma" not in never_launched(host)


def test_what_it_does_not_compute_goes_to_the_other_kernels(host, monkeypatch):
    """Few tokens, and groups."""
    monkeypatch.setenv(CAPABILITY, "90")
    monkeypatch.setenv(CHOICE, "wgmma")
    few = inputs_of(INT4, "Gemm", 16, 40, 64, host)
    run(host, "Int4Gemm", few, (16, 40))
    groups = inputs_of(INT4, "Gemm", 40, 40, 128, host)
    groups[3] = np.ones((40, 2), np.float32)
    run(host, "Int4Gemm", groups, (40, 40))
    missing = never_launched(host)
    assert {"int4_gemm_16", "int4_gemm_64x64_groups"}.isdisjoint(missing) and "int4_gemm_128x128_wgmma" in missing


@pytest.mark.parametrize(
    ("choice", "capability", "message"),
    [
        ("wgmma", "86", "DIT2DEPLOY_CUDA=wgmma needs the emulated GPU of D2D_HOST_CAPABILITY=90"),
        ("wgmma", "100", "DIT2DEPLOY_CUDA=wgmma needs the emulated GPU of D2D_HOST_CAPABILITY=90"),
        ("hopper", "90", "DIT2DEPLOY_CUDA=hopper names no kernels; known: mma (on every GPU, the default), wgmma"),
    ],
)
def test_a_choice_that_cannot_be_is_refused(choice: str, capability: str, message: str, host, monkeypatch):
    monkeypatch.setenv(CAPABILITY, capability)
    monkeypatch.setenv(CHOICE, choice)
    with pytest.raises(Failed) as refused:
        run(host, "Int4Gemm", inputs_of(INT4, "Gemm", 17, 40, 64, host), (17, 40))
    assert message in refused.value.cause


BARRIER = "        gpu::sync_block();\n        W weights;"
LAST = "wgmma_wait<0>();\n    gpu::sync_block();"
# What is changed in the kernel, and what the emulator says to it; K has more steps than the ring has stages.
PLANTED = {
    "none": ("", "", ""),
    "wait for copies one too weak": ("wait<stages - 3>", "wait<stages - 2>", "was not waited for"),
    "copies are not fenced": ("gpu::fence_async_proxy();", "", "without fence_async_proxy before the barrier"),
    "no barrier a step": (BARRIER, BARRIER.partition("\n")[2], "a barrier is missing"),
    "registers are not fenced": ("gpu::wgmma_fence();", "", "written and not fenced since"),
    "wait for products one too weak": ("wgmma_wait<1>", "wgmma_wait<2>", "changes registers of a wgmma"),
    "sums before the last product": ("gpu::wgmma_wait<0>();", "", "reads sums of a wgmma"),
    "the stage that is read is overwritten": ("fetch(memory, unused", "fetch(memory, stage", "overwrites what a wgmma"),
    "another stage": ("b + stage + 2", "b + unused + 2", "multiplies"),
    "no barrier before the sums": (LAST, LAST.partition("\n")[0], "a barrier is missing"),
    "no barrier after the sums": ("sums);\n    gpu::sync_block();", "sums);", "a barrier is missing"),
    "sums of another output": ("+ 8 * (r / 2 % 2) + lane / 4;", "+ 8 * (r / 2 % 2) + (lane / 4 ^ 1);", " is "),
    "outputs beyond N": ("if (token >= p.m || output >= p.n)", "if (token >= p.m)", "touches global memory"),
}


@pytest.fixture(scope="module")
def planted(tmp_path_factory, emulator) -> Planted:
    folder = tmp_path_factory.mktemp("same")
    source = PLUGINS / "cuda_on_host" / "wgmma_on_host.cc"
    return Planted(folder, emulator, compile_cpp(folder / "wgmma.o", [source], "-O1", "-c", folders=FOLDERS))


@pytest.mark.parametrize("name", PLANTED)
def test_the_emulator_finds_what_is_planted_in_the_kernel(planted, library, tmp_path, name: str):
    old, new, report = PLANTED[name]
    sources = changed(("cuda_tiles.h", "cuda_wgmma.cu"), old, new)
    source = sources["cuda_wgmma.cu"]
    kept, defined, _ = source.partition("QUANT_GEMM_WGMMA(ternary_gemm, 0)")
    sources["cuda_wgmma.cu"] = kept + defined
    judge(*planted.run(tmp_path, sources, "wgmma", 8 * 64 + 16, library), report)
