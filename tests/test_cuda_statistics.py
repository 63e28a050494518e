"""The statistics tool: occupancy by arithmetic, loops in machine code, and the kernels' promises on one generation."""

import importlib.util
import locale
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def load():
    spec = importlib.util.spec_from_file_location("cuda_statistics", ROOT / "tools" / "cuda_statistics.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["cuda_statistics"] = module  # dataclasses ask for it
    spec.loader.exec_module(module)
    return module


statistics = load()
SM = {sm.name: sm for sm in statistics.SMS}


def kernel(sm: str, *, threads: int = 128, registers: int = 32, shared: int = 0, **other):
    values = {"name": "ternary_gemm_128x128", "spilled": 0, "stack": 0, "loop": None}
    return statistics.Kernel(sm=SM[sm], registers=registers, shared=shared, threads=threads, **{**values, **other})


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "blocks"),
    [
        (256, 128, 40 << 10, {"8.0": 2, "8.6": 2, "8.9": 2, "9.0": 2, "12.0": 2, "7.5": 1}),  # registers; 7.5: shared
        (256, 128, 80 << 10, {"8.0": 2, "8.6": 1, "9.0": 2, "12.0": 1}),
        (128, 119, 32 << 10, {"8.0": 4, "9.0": 4, "8.6": 3, "8.9": 3, "12.0": 3}),
        (256, 32, 0, {"7.5": 4, "8.0": 8, "8.6": 6}),  # warps
        (32, 16, 0, {"7.5": 16, "8.0": 32, "8.6": 16, "8.9": 24}),  # blocks
    ],
)
def test_occupancy_is_the_least_of_four_limits(threads, registers, shared, blocks):
    for sm, expected in blocks.items():
        assert kernel(sm, threads=threads, registers=registers, shared=shared).blocks() == expected, sm


def test_a_kernel_without_a_bound_has_no_occupancy():
    assert kernel("8.0", threads=None).blocks() is None


SASS = """
\t\tFunction : ternary_gemm_128x128
        /*0000*/                   MOV R1, c[0x0][0x28] ;                     /* 0x00000a0000017a02 */
        /*0010*/                   LOP3.LUT R4, R3, 0xc0c0c0c0, RZ, 0xc0, !PT ; /* 0x0 */
        /*0020*/                   IMAD.SHL.U32 R5, R3, 0x4, RZ ;             /* 0x0 */
        /*0030*/                   IMMA.16832.S8.S8 R8, R4.ROW, R6.COL, R8 ;  /* 0x0 */
        /*0040*/                   NOP ;                                      /* 0x0 */
        /*0050*/              @!P0 IADD3 R3, R3, 0x1, RZ ;                    /* 0x0 */
        /*0060*/               @P1 BRA 0x10 ;                                 /* 0x0 */
        /*0070*/                   EXIT ;                                     /* 0x0 */
        /*0080*/                   BRA 0x80;                                  /* 0x0 */
"""


def test_the_main_loop_is_the_branch_back_over_tensor_instructions():
    ((name, code),) = statistics.functions(SASS)
    loop = statistics.main_loop(code, SM["8.0"])
    assert name == "ternary_gemm_128x128"
    assert (loop.products, loop.others, loop.unpacking) == (1, 4, 2)
    assert statistics.main_loop(code[4:], SM["8.0"]) is None


def test_the_record_holds_what_the_table_shows():
    loop = statistics.Loop(products=32, others=64, unpacking=32)
    found = statistics.record(kernel("9.0", registers=128, threads=256, shared=40 << 10, loop=loop))
    assert (found["resident_blocks"], found["resident_warps"], found["others_a_mma"]) == (2, 16, 2.0)
    assert found["instructions_to_unpack_a_register"] == 2.0 and found["sm"] == "9.0"


def test_spills_and_broken_promises_are_faults():
    promised = statistics.promises()
    formats = ("ternary", "int3", "int4", "int8")
    packed = (f"{fmt}_packed{on}" for fmt in formats[:3] for on in ("", "_on_int8"))
    assert set(promised) == {*formats, *(f"{fmt}_wgmma" for fmt in formats), *packed}
    unpack, others = promised["ternary"]
    sound = statistics.Loop(products=32, others=int(32 * others), unpacking=int(16 * unpack))
    assert statistics.broken(kernel("8.0", loop=sound), promised) == []
    assert "spills 8 bytes" in statistics.broken(kernel("8.0", spilled=8), promised)[0]
    slow = statistics.Loop(products=32, others=int(32 * others) + 1, unpacking=int(16 * unpack) + 1)
    assert len(statistics.broken(kernel("8.0", loop=slow), promised)) == 2


def test_the_promises_of_wgmma_are_for_each_product_and_its_four_registers():
    promised = statistics.promises()
    unpack, others = promised["int3_wgmma"]
    sound = statistics.Loop(products=4, others=int(4 * others), unpacking=int(16 * unpack))
    on_wgmma = {"name": "int3_gemm_128x256_wgmma", "threads": 256}
    assert statistics.broken(kernel("9.0", loop=sound, **on_wgmma), promised) == []
    slow = statistics.Loop(products=4, others=int(4 * others) + 1, unpacking=int(16 * unpack) + 1)
    assert len(statistics.broken(kernel("9.0", loop=slow, **on_wgmma), promised)) == 2
    waits = kernel("9.0", loop=sound, serialized="a reason", **on_wgmma)
    assert statistics.broken(waits, promised) == ["int3_gemm_128x256_wgmma on 9.0: waits for every wgmma: a reason"]


SERIAL = """
#include "wgmma.h"
GPU_KERNEL_OF(128, 1, serial, const long long* from, int* to) {
    gpu::WgmmaSums<128> sums;
    gpu::WgmmaRows rows;
    for (int step = 0; step < from[0]; ++step) {
        for (int r = 0; r < 4; ++r) rows.set(r, (unsigned)from[r]);
        gpu::wgmma_fence();
        gpu::wgmma(sums, rows, (unsigned long long)from[step]);
        gpu::wgmma_commit();
        for (int r = 0; r < 64; ++r) to[r] = sums.at(r);
    }
    gpu::wgmma_wait<0>();
}
"""


def test_the_compiler_tells_what_makes_every_wgmma_wait(tmp_path):
    """A kernel that reads sums while a product is under way."""
    build, found = statistics.compiler(), statistics.tools()
    if found is None or build.nvrtc() is None:
        pytest.skip("cuobjdump, nvdisasm or NVRTC is not installed: `make cuda-statistics` installs them")
    source = tmp_path / "serial.cu"
    source.write_text(SERIAL)
    encoding = locale.nl_langinfo(locale.CODESET)
    (serial,) = statistics.kernels_of(build.compiled(source, "sm_90a"), SM["9.0"], found)
    assert locale.nl_langinfo(locale.CODESET) == encoding
    assert serial.name == "serial" and "wgmma" in serial.serialized


def test_too_few_warps_are_a_fault():
    rows = {"name": "hadamard_quantize_warps", "threads": 128}
    assert statistics.broken(kernel("8.0", registers=168, **rows), {}) == []  # 3 blocks of 4 warps
    assert "8 warps an SM, promised 12" in statistics.broken(kernel("8.0", registers=255, **rows), {})[0]


@pytest.mark.parametrize(
    ("source", "sm", "count", "loops"),
    [
        (statistics.GEMM, "7.5", 42, 20),
        (statistics.GEMM, "8.0", 42, 20),
        (statistics.GEMM, "12.0", 42, 20),
        (statistics.WGMMA, "9.0", 8, 8),
        (statistics.WGMMA, "8.0", 0, 0),
    ],
)
def test_the_gemms_keep_their_promises(source: str, sm: str, count: int, loops: int):
    """Without and with the instructions of 8.0, by CUDA 13's compiler, and with those of 9.0a; all generations: `make
    cuda-statistics`."""
    found = statistics.tools()
    if found is None or statistics.compiler().nvrtc(SM[sm].target) is None:
        pytest.skip("cuobjdump, nvdisasm or NVRTC is not installed: `make cuda-statistics` installs them")
    kernels = statistics.collect((SM[sm],), [source], found)
    assert len(kernels) == count and sum(kernel.loop is not None for kernel in kernels) >= loops
    promised = statistics.promises()
    assert [fault for kernel in kernels for fault in statistics.broken(kernel, promised)] == []
