"""Static figures of the CUDA kernels, for every GPU generation and without a GPU, from their machine code.

Each source becomes the machine code that the library holds (plugins/cuda/compile.py). The compiler's log tells
registers and spills; cuobjdump disassembles it. Occupancy is arithmetic (blocks an SM by registers, warps and static
shared memory). The main loop of a tensor-core kernel is its shortest backward branch over the most tensor instructions;
its columns hold

  unpack   instructions that can unpack (logic, shifts, permutes) for each register of weights, four bytes or, of the
           kernels *_packed on int4 tensor cores, eight nibbles: an upper bound, since addresses shift too, and from SM
           9.0 on packed activations are unpacked
  others   all instructions but the tensor ones and NOP, for each mma.m16n8k32 or m16n8k64 (on SM 7.5 four
           instructions are one), or, of the kernels *_wgmma, for each wgmma.m64n128k32

A kernel whose wgmma's the compiler made to wait for one another (its "serialized") breaks a promise too.
"""

import argparse
import collections
import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit2deploy.artefacts.results import write_results

ROOT = Path(__file__).resolve().parent.parent
TOOLS_VARIABLE = "D2D_CUDA_TOOLS"
GEMM = "ops/quant_gemm/cuda.cu"
WGMMA = "ops/quant_gemm/cuda_wgmma.cu"
ROWS = "ops/hadamard_quantize/cuda_warp_rows.h"
LAUNCHED = 128  # threads of a block of the kernels *_warps, mostly: they are bound to more

EXAMPLE = f"""example:
  python tools/cuda_statistics.py                  # the table
  python tools/cuda_statistics.py --check          # exit code 1 where a kernel spills or breaks a promise of {GEMM},
                                                   # {WGMMA}
                                                   # or {ROWS}
  python tools/cuda_statistics.py --sm 8.9 --source quant_gemm
  python tools/cuda_statistics.py --check --out tools/results/cuda_statistics.json

cuobjdump and nvdisasm are looked for in ${TOOLS_VARIABLE}, in build/cuda-tools
(`make cuda-statistics` fills it) and on PATH."""


@dataclass(frozen=True)
class Sm:
    """One generation: limits of a streaming multiprocessor (CUDA programming guide, table of compute capabilities)."""

    name: str
    target: str  # of the machine code that it runs
    warps: int
    blocks: int
    shared: int  # KiB for all blocks
    reserved: int  # bytes of it that each block takes beside its own


SMS = (
    Sm("7.5", "sm_75", 32, 16, 64, 0),
    Sm("8.0", "sm_80", 64, 32, 164, 1024),
    Sm("8.6", "sm_86", 48, 16, 100, 1024),
    Sm("8.7", "sm_87", 48, 16, 164, 1024),
    Sm("8.9", "sm_86", 48, 24, 100, 1024),
    Sm("9.0", "sm_90", 64, 32, 228, 1024),
    Sm("12.0", "sm_120", 48, 24, 100, 1024),
)
REGISTERS = 65536
TENSOR = re.compile(r"[HI]G?MMA\b")
SERIALIZED = re.compile(r"wgmma\.mma_async instructions are serialized due to (.+?) in (?:the )?function '(\w+)'")


@dataclass(frozen=True)
class Loop:
    """Instructions of a tensor-core main loop."""

    products: int  # mma.m16n8k32 or what stands for it
    others: int
    unpacking: int


@dataclass(frozen=True)
class Kernel:
    name: str
    sm: Sm
    registers: int
    spilled: int  # bytes stored and loaded
    stack: int
    shared: int  # bytes, static
    threads: int | None  # of a block, where the kernel is bound to a number
    loop: Loop | None
    serialized: str = ""  # why each wgmma waits for the one before

    def blocks(self) -> int | None:
        """Blocks that an SM holds: registers come in units of 256 a warp, shared memory in 128 bytes (7.5: 256)."""
        if self.threads is None:
            return None
        warps = self.threads // 32
        by_registers = REGISTERS // (-(-self.registers * 32 // 256) * 256) // warps
        unit = 256 if self.sm.name == "7.5" else 128
        taken = -(-(self.shared + self.sm.reserved) // unit) * unit
        by_shared = self.sm.shared * 1024 // taken if taken else self.sm.blocks
        return min(self.sm.warps // warps, self.sm.blocks, by_registers, by_shared)


def compiler():
    """plugins/cuda/compile.py as a module: the sources and options of the build."""
    spec = importlib.util.spec_from_file_location("d2d_cuda_compile", ROOT / "plugins" / "cuda" / "compile.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tools() -> dict[str, str] | None:
    """Paths of cuobjdump and nvdisasm; None where one is missing."""
    named = os.environ.get(TOOLS_VARIABLE)
    homes = [*(ROOT / "build" / "cuda-tools").glob("nvidia/*/bin")]
    path = os.pathsep.join([*([named] if named else []), *map(str, homes), os.environ.get("PATH", "")])
    found = {name: shutil.which(name, path=path) for name in ("cuobjdump", "nvdisasm")}
    return {**found, "path": path} if all(found.values()) else None


def kernels_of(made, sm: Sm, found: dict[str, str]) -> list[Kernel]:
    """The kernels of one source (`Compiled` of compile.py) on one generation."""
    bounds = {
        name: int(threads)
        for name, threads in re.findall(r"\.entry (\w+)\([^)]*\)\s*\.maxntid (\d+)", made.ptx.decode(errors="replace"))
    }
    environment = {**os.environ, "PATH": found["path"]}
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "module.cubin"
        cubin.write_bytes(made.code)
        command = [found["cuobjdump"], "-sass", str(cubin)]
        sass = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    loops = {name: main_loop(code, sm) for name, code in functions(sass)}
    serialized = {name: reason for reason, name in SERIALIZED.findall(made.log)}
    return [
        Kernel(
            name,
            sm,
            number(r"Used (\d+) registers", text),
            number(r"(\d+) bytes spill stores", text) + number(r"(\d+) bytes spill loads", text),
            number(r"(\d+) bytes stack frame", text),
            number(r"(\d+) bytes smem", text),
            LAUNCHED if name.endswith("_warps") else bounds.get(name),
            loops[name],
            serialized.get(name, ""),
        )
        for name, text in re.findall(r"entry function '(\w+)'(.*?)(?=Compiling entry|\Z)", made.log, re.DOTALL)
    ]


def number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def functions(sass: str) -> Iterator[tuple[str, list[tuple[int, str]]]]:
    """Name and (address, instruction) of each function of cuobjdump's text."""
    for part in re.split(r"\n\s+Function : ", sass)[1:]:
        lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;/]*);", part)
        yield part.split()[0], [(int(address, 16), re.sub(r"^@!?U?P\w+\s+", "", text)) for address, text in lines]


def main_loop(code: list[tuple[int, str]], sm: Sm) -> Loop | None:
    bodies = []
    for address, text in code:
        target = re.match(r"BRA.*\b0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < address:
            body = [opcode for at, opcode in code if int(target[1], 16) <= at <= address]
            bodies.append((sum(bool(TENSOR.match(opcode)) for opcode in body), -len(body), body))
    count, _, body = max(bodies, default=(0, 0, []), key=lambda entry: entry[:2])
    if not count:
        return None
    names = collections.Counter(opcode.split()[0] for opcode in body)
    unpacking = sum(n for name, n in names.items() if re.match(r"LOP3|SHF|SHL|PRMT|IMAD\.SHL|LEA", name))
    others = sum(n for name, n in names.items() if not TENSOR.match(name) and name != "NOP")
    return Loop(count // (4 if sm.name == "7.5" else 1), others, unpacking)


def promises() -> dict[str, tuple[float, float]]:
    """unpack and others by format, from the head comments of the GEMMs."""
    text = "".join((ROOT / "plugins" / source).read_text() for source in (GEMM, WGMMA))
    rows = re.findall(r"^//   (\w+) +([\d.]+) +([\d.]+)$", text, re.MULTILINE)
    return {name: (float(unpack), float(others)) for name, unpack, others in rows}


def resident_warps() -> int:
    """Of the kernels that keep rows in registers, from their head comment."""
    return int(re.search(r"^//   resident warps (\d+)$", (ROOT / "plugins" / ROWS).read_text(), re.MULTILINE)[1])


def unpack_of(kernel: Kernel) -> float | None:
    """Instructions for a register of weights: in the 128 x 128 kernels 2 registers serve 4 mma, one a row tile; a wgmma
    takes 4, and serves all tokens."""
    if kernel.loop is None or not re.search(r"_128x128(_packed)?$|_wgmma$", kernel.name):
        return None
    registers = kernel.loop.products * (4 if kernel.name.endswith("_wgmma") else 0.5)
    return kernel.loop.unpacking / registers


def others_of(kernel: Kernel) -> float | None:
    """Instructions for each mma beside it; a loop over groups holds the end of one, which few steps reach."""
    if kernel.loop is None or "_groups" in kernel.name:
        return None
    return kernel.loop.others / kernel.loop.products


def promise_of(kernel: Kernel) -> str:
    """Its line in the head comments: packed codes are another loop where there are no int4 tensor cores."""
    name = re.sub(r"_gemm_128x\d+", "", kernel.name)
    on_int8 = name.endswith("_packed") and float(kernel.sm.name) >= 9
    return name + "_on_int8" * on_int8


def broken(kernel: Kernel, promised: dict[str, tuple[float, float]]) -> list[str]:
    """What a kernel does that it must not."""
    faults = []
    if kernel.spilled or kernel.stack:
        faults.append(f"spills {kernel.spilled} bytes, stack {kernel.stack}")
    if kernel.serialized:
        faults.append(f"waits for every wgmma: {kernel.serialized}")
    if kernel.name.endswith("_warps"):
        warps = kernel.blocks() * kernel.threads // 32
        if warps < resident_warps():
            faults.append(f"{warps} warps an SM, promised {resident_warps()}")
    unpack = unpack_of(kernel)
    if unpack is not None:
        least, others = promised[promise_of(kernel)]
        if unpack > least:
            faults.append(f"unpacks a register of weights in {unpack:.2f} instructions, promised {least}")
        if kernel.loop.others / kernel.loop.products > others:
            faults.append(f"{kernel.loop.others / kernel.loop.products:.2f} others for a mma, promised {others}")
    return [f"{kernel.name} on {kernel.sm.name}: {fault}" for fault in faults]


def table(kernels: list[Kernel]) -> str:
    lines = [
        f"{'kernel':34}{'SM':>6}{'regs':>6}{'spill':>7}{'shared':>8}{'blocks':>8}{'warps':>12}{'unpack':>8}{'others':>8}"
    ]
    for kernel in sorted(kernels, key=lambda k: (k.name, SMS.index(k.sm))):
        blocks = kernel.blocks()
        warps = "" if blocks is None else f"{blocks * kernel.threads // 32} of {kernel.sm.warps}"
        unpack = unpack_of(kernel)
        others = others_of(kernel)
        lines.append(
            f"{kernel.name:34}{kernel.sm.name:>6}{kernel.registers:>6}{kernel.spilled:>7}{kernel.shared:>8}"
            f"{'' if blocks is None else blocks:>8}{warps:>12}"
            f"{'' if unpack is None else f'{unpack:.2f}':>8}{'' if others is None else f'{others:.2f}':>8}"
        )
    return "\n".join(lines)


def record(kernel: Kernel) -> dict[str, Any]:
    """Plain values, for the result file."""
    blocks = kernel.blocks()
    return {
        "kernel": kernel.name,
        "sm": kernel.sm.name,
        "registers": kernel.registers,
        "spilled_bytes": kernel.spilled,
        "stack_bytes": kernel.stack,
        "shared_bytes": kernel.shared,
        "threads": kernel.threads,
        "resident_blocks": blocks,
        "resident_warps": None if blocks is None else blocks * kernel.threads // 32,
        "instructions_to_unpack_a_register": unpack_of(kernel),
        "others_a_mma": others_of(kernel),
        "serialized": kernel.serialized,
    }


def known(library: ctypes.CDLL | None) -> list[int]:
    """The compute capabilities that an NVRTC makes machine code for, in tenths; none where it is not installed."""
    if library is None:
        return []
    count = ctypes.c_int()
    library.nvrtcGetNumSupportedArchs(ctypes.byref(count))
    found = (ctypes.c_int * count.value)()
    library.nvrtcGetSupportedArchs(found)
    return list(found)


def collect(sms: tuple[Sm, ...], sources: list[str], found: dict[str, str]) -> list[Kernel]:
    """The kernels of those sources on those generations; a source for one GPU on that alone."""
    build = compiler()
    cache, kernels = build.cache_folder(), []
    for source in sources:
        only = build.FOR_ONE_GPU.get(source)
        targets = {sm: only or sm.target for sm in sms if only in (None, f"{sm.target}a")}
        made = {target: build.cached(source, target, cache) for target in set(targets.values())}
        for sm, target in targets.items():
            kernels += kernels_of(made[target], sm, found)
    return kernels


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="exit code 1 where a kernel spills or breaks a promise")
    parser.add_argument("--sm", choices=[sm.name for sm in SMS], help="one generation only")
    parser.add_argument("--source", default="", help="only sources whose path holds this text")
    parser.add_argument("--out", type=Path, help="also write the result file, e.g. tools/results/cuda_statistics.json")
    arguments = parser.parse_args()
    found, build = tools(), compiler()
    if found is None or build.nvrtc() is None:
        print(
            "cuobjdump, nvdisasm or NVRTC is not installed: `make cuda-statistics` installs them",
            file=sys.stderr,
        )
        return build.NOT_FOUND
    wanted = tuple(sm for sm in SMS if arguments.sm in (None, sm.name))
    sms = tuple(sm for sm in wanted if int(sm.target.removeprefix("sm_")) in known(build.nvrtc(sm.target)))
    versions = {sm.name: ".".join(map(str, build.version(build.nvrtc(sm.target)))) for sm in sms}
    missing = [sm.name for sm in wanted if sm not in sms]
    if missing:
        print(f"not shown: {', '.join(missing)}, for which the NVRTC here makes no machine code", file=sys.stderr)
    kernels = collect(sms, [source for source in build.SOURCES if arguments.source in source], found)
    print(table(kernels))
    faults = [fault for kernel in kernels for fault in broken(kernel, promises())]
    if arguments.out:
        rows = [record(kernel) for kernel in kernels]
        values = {"nvrtc": versions, "not_shown": missing, "faults": faults}
        write_results(arguments.out, "cuda_statistics", {**values, "kernels": rows})
    if arguments.check and faults:
        print(*faults, sep="\n", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
