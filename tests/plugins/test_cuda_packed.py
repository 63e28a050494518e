"""Packed codes on the emulated GPU: what quantizers write, and GEMMs of them, against those of a code a byte."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from dit2deploy.base.errors import Failed
from dit2deploy.formats import FORMATS, INT4, INT8, Format
from dit2deploy.ops import OPS
from dit2deploy.ops.op import Case, Op
from dit2deploy.ops.packed_codes import pack_codes, unpack_codes
from dit2deploy.targets import kernel
from tests.plugins.gemms import in_fragments, never_launched, on_host, weights_of

NARROW = [fmt for fmt in FORMATS if fmt is not INT8]
# With int4 tensor cores, and without.
CAPABILITIES = (80, 90)
# (M, N, K, groups) of each kernel for tiles: 16 x 8 blocks of 128 x 128; small; groups; slices of K.
TILES = {
    "128x128": (16 * 128 - 37, 8 * 128 - 9, 128, 1),
    "64x64": (70, 99, 192, 1),
    "64x64_groups": (17, 40, 192, 3),
    "64x64_slice": (17, 33, 65 * 64, 1),
}
# The others: few tokens, and those whose groups or K are not the tiles'.
OTHERS = {"16": (16, 35, 576, 1), "16_groups": (9, 40, 256, 4), "any": (17, 33, 192, 6)}


def packed(q: np.ndarray) -> np.ndarray:
    return pack_codes(torch.from_numpy(q)).numpy()


def codes(m: int, k: int) -> np.ndarray:
    return np.random.default_rng(m + k).integers(-8, 7, (m, k), endpoint=True).astype(np.int8)


def test_packing_is_by_halves_of_a_run():
    q = codes(3, 128)
    bytes_of = packed(q).view(np.uint8).astype(int)
    for run, i in np.ndindex(2, 32):
        low, high = q[:, 64 * run + i].astype(int), q[:, 64 * run + i + 32].astype(int)
        np.testing.assert_array_equal(bytes_of[:, 32 * run + i], (low & 15) + 16 * (high & 15))
    np.testing.assert_array_equal(unpack_codes(torch.from_numpy(packed(q))).numpy(), q)
    with pytest.raises(ValueError, match="runs of 64 columns, which 96 columns are not"):
        packed(codes(1, 96))


@pytest.mark.parametrize("tiles", TILES | OTHERS)
@pytest.mark.parametrize("fmt", NARROW, ids=lambda fmt: fmt.name)
def test_a_gemm_of_packed_codes_gives_the_bits_of_one_of_bytes(fmt: Format, tiles: str, library, monkeypatch, tmp_path):
    """Every code and the extremes of the weights, on GPUs with int4 tensor cores and without."""
    host = Path(shutil.copy(on_host(library), tmp_path))  # which has launched nothing yet
    m, n, k, groups = (TILES | OTHERS)[tiles]
    rng, q, weights = np.random.default_rng(0), codes(m, k), weights_of(fmt, n, k)
    q[0], weights[0] = -8, -fmt.offset  # the largest sum
    q[1], weights[1] = 7, fmt.levels - 1 - fmt.offset
    s, ws = rng.uniform(0.01, 0.1, (m, 1)).astype(np.float32), rng.uniform(0.01, 0.1, (n, groups)).astype(np.float32)
    rest = [s, in_fragments(fmt, weights, library), ws, np.ones(n, np.float32)]

    def run(q: np.ndarray, **attributes: int) -> np.ndarray:
        attributes |= {"bits": 4, "layout": kernel.FRAGMENT_ORDER}
        return kernel.run(f"{fmt.title}Gemm", [q, *rest], attributes, [(m, n)], isa="cuda_on_host", library=host)[0]

    want = run(q)
    name = f"{fmt.name}_gemm_{tiles}" + "_packed" * (tiles in TILES)
    assert tiles in OTHERS or name in never_launched(host)
    for capability in CAPABILITIES:
        monkeypatch.setenv("D2D_HOST_CAPABILITY", str(capability))
        np.testing.assert_array_equal(run(packed(q), packed=1), want)
    assert name not in never_launched(host)
    sums = q.reshape(m, groups, -1).astype(int).swapaxes(0, 1) @ weights.reshape(n, groups, -1).transpose(1, 2, 0)
    np.testing.assert_allclose(want, (sums * ws.T[:, None]).sum(0) * s + 1, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("m", [1, 15, 17, 64, 65, 127, 300])
def test_any_number_of_tokens(m: int, library):
    n, k = 70, 128
    q, weights = codes(m, k), weights_of(INT4, n, k)
    inputs = [packed(q), np.ones((m, 1), np.float32), in_fragments(INT4, weights, library)]
    inputs += [np.ones((n, 1), np.float32), np.zeros(n, np.float32)]
    attributes = {"bits": 4, "layout": kernel.FRAGMENT_ORDER, "packed": 1}
    (y,) = kernel.run("Int4Gemm", inputs, attributes, [(m, n)], isa="cuda_on_host", library=on_host(library))
    np.testing.assert_array_equal(y, q.astype(int) @ weights.T)


def test_wgmma_is_not_for_packed_codes(library, monkeypatch, tmp_path):
    """Its products read shared memory, a byte a code: where it is asked for, they go to the tiles."""
    host = Path(shutil.copy(on_host(library), tmp_path))
    monkeypatch.setenv("DIT2DEPLOY_CUDA", "wgmma")
    monkeypatch.setenv("D2D_HOST_CAPABILITY", "90")
    m, n, k = 17, 40, 64
    q, weights = codes(m, k), weights_of(INT4, n, k)
    inputs = [packed(q), np.ones((m, 1), np.float32), in_fragments(INT4, weights, library)]
    inputs += [np.ones((n, 1), np.float32), np.zeros(n, np.float32)]
    attributes = {"bits": 4, "layout": kernel.FRAGMENT_ORDER, "packed": 1}
    (y,) = kernel.run("Int4Gemm", inputs, attributes, [(m, n)], isa="cuda_on_host", library=host)
    np.testing.assert_array_equal(y, q.astype(int) @ weights.T)
    assert "int4_gemm_64x64_packed" not in never_launched(host)


# Rows, K, block: in registers, a warp a row and several, rows that end in a piece; through shared memory, in tiles.
ROWS = [(5, 64, 64), (5, 192, 32), (3, 1152, 128), (2, 4672, 64), (3, 2048, 1024), (2, 24832, 256), (3, 1088, 1)]


@pytest.mark.parametrize("kind", [("absmax", "mid-tread"), ("gaussian", "mid-rise")], ids="-".join)
@pytest.mark.parametrize("op", ["HadamardQuantize", "AdaLnHadamardQuantizeKeep", "ActivationHadamardQuantizeKeep"])
@pytest.mark.parametrize(("m", "k", "block"), ROWS, ids=str)
def test_packed_rows_are_the_codes_packed(op: str, m: int, k: int, block: int, kind: tuple[str, str], library):
    """The last row's qmax is 8, which 4 bits do not hold: its step is NaN."""
    rng = np.random.default_rng(m + k)
    inputs = [rng.standard_normal((m, k), np.float32), np.array([7.5] * (m - 1) + [8], np.float32)]
    if op.startswith("AdaLn"):
        inputs[1:1] = [*(rng.standard_normal((1, k), np.float32) for _ in range(2)), np.array([1e-6], np.float32)]
    host, attributes = on_host(library), {"block": block, "clip": kind[0], "grid": kind[1]}
    results = 3 if op.endswith("Keep") else 2
    wide, narrow = ([(m, width), (m, 1), (m, k)][:results] for width in (k, k // 2))
    q, *want = kernel.run(op, inputs, attributes, wide, isa="portable", library=host)
    q[-1], want[0][-1] = 0, np.nan
    got = kernel.run(op, inputs, attributes | {"packed": 1}, narrow, isa="cuda_on_host", library=host)
    for name, g, w in zip("qsy", got, (packed(q), *want), strict=False):
        np.testing.assert_array_equal(g, w, err_msg=name)


def first_case(name: str) -> tuple[Op, Case]:
    op = next(op for op in OPS if op.name == name)
    return op, next(case for case in op.cases() if case.name in ("one-token", "one-token-absmax"))


def run_first(name: str, library: Path, *, columns: int = 64, isa: str = "cuda_on_host", **attributes: int) -> None:
    op, case = first_case(name)
    inputs = [case.inputs[port.name] for port in op.inputs]
    inputs[0] = inputs[0][..., : columns // 2 if "Gemm" in name else columns]
    values = {**op.attributes, **case.attributes, "packed": 1, "block": 1, **attributes}
    values = {key: value for key, value in values.items() if key in op.attributes}
    shapes = op.output_shapes([value.shape for value in inputs], values)
    kernel.run(op.name, inputs, values, shapes, isa=isa, library=on_host(library))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("HadamardQuantize", {"packed": 2}, r"packed must be 0 \(a code a byte\) or 1 \(two codes a byte\), got 2"),
        ("TernaryGemm", {"packed": -1}, "packed must be 0 "),
        ("HadamardQuantize", {"columns": 48}, "packed codes lie in runs of 64 columns: .*got 48"),
        ("Int3Gemm", {"columns": 32}, "packed codes lie in runs of 64 columns: .*got 32"),
        ("Int4Gemm", {"bits": 5}, "packed codes have at most 4 bits, this node's have 5"),
        ("Int8Gemm", {}, "packed codes are for weights of at most 4 bits"),
        ("HadamardQuantize", {"isa": "portable"}, "CPU kernels take a code a byte .packed 0., this node packs two"),
        ("TernaryGemmResidual", {"isa": "portable"}, "CPU kernels take a code a byte"),
    ],
)
def test_what_cannot_be_packed_is_refused_in_words(name: str, changes: dict, message: str, library):
    with pytest.raises(Failed, match=message):
        run_first(name, library, **changes)


@pytest.mark.parametrize(("name", "bits"), [("TernaryGemm", 5), ("Int8Gemm", 4)])
def test_pytorch_refuses_wide_codes_and_weights(name: str, bits: int):
    op, case = first_case(name)
    inputs = [torch.from_numpy(np.ascontiguousarray(case.inputs[port.name])) for port in op.inputs]
    with pytest.raises(ValueError, match="packed codes and their weights have at most 4 bits"):
        op.compute(*inputs, bits=bits, layout=0, packed=1)
