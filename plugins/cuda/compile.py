"""Compiles the CUDA kernels with NVRTC and writes them for the library to hold: no CUDA toolkit, no GPU.

NVRTC comes from the wheels nvidia-cuda-nvrtc-cu12 and nvidia-cuda-nvrtc (build requirements) and is called through
ctypes. Each source becomes machine code for the capabilities below, which the driver loads as it is, and PTX for what
has none, which it compiles at first use. Machine code of 8.0 runs on 8.6 and so on, within a major version, but not
between 8.7, which is Tegra, and the others. Left out: 8.9, whose code is that of 8.6 byte for byte, for build time and
the library's size (an engine that embeds its plugins holds the library). Sources of FOR_ONE_GPU use instructions that
no other GPU has, nor a later one: they become that GPU's machine code alone.

CUDA 12.4 makes all but the code for 12.0, which it does not know: drivers since 550 load what it makes. CUDA 13 makes
that, with ptxas held to few registers, without which 12.8 to 13.5 spill some in GEMMs of 128 x 128 tiles. An older
driver than 580 refuses it and is given the PTX (base/cuda_driver.cc), and so is every driver where the library was
built without the wheel of CUDA 13.

    python plugins/cuda/compile.py cuda_kernels.h     # and beside it what the header embeds, and a cache of the images

The cache is in the folder D2D_CUDA_CACHE where that is set: several builds, and tools/cuda_statistics.py, then compile
once.
"""

import argparse
import ctypes
import hashlib
import importlib.util
import os
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

PLUGINS = Path(__file__).resolve().parent.parent
SOURCES = (
    "ops/activation_hadamard_quantize/cuda.cu",
    "ops/ada_ln_hadamard_quantize/cuda.cu",
    "ops/hadamard_quantize/cuda.cu",
    "ops/monarch/cuda.cu",
    "ops/multi_region_quantize/cuda.cu",
    "ops/quant_gemm/cuda.cu",
    "ops/quant_gemm/cuda_wgmma.cu",
    "ops/quant_matmul/cuda.cu",
)
HEADERS = (
    "base/integers.h",
    "cuda/elements.h",
    "cuda/gpu.h",
    "cuda/wgmma.h",
    "formats/formats.h",
    "ops/activation_hadamard_quantize/activation.h",
    "ops/hadamard_quantize/cuda_rows.h",
    "ops/hadamard_quantize/cuda_warp_rows.h",
    "ops/hadamard_quantize/row_scale.h",
    "ops/quant_gemm/cuda_few_tokens.h",
    "ops/quant_gemm/cuda_parts.h",
    "ops/quant_gemm/cuda_tiles.h",
    "ops/quant_gemm/cuda_wgmma.h",
    "ops/quant_gemm/fragments.h",
)
MACHINE_CODE = ("sm_75", "sm_80", "sm_86", "sm_87", "sm_90")
BY_CUDA_13 = ("sm_120",)
PTX = "compute_90"
FOR_ONE_GPU = {"ops/quant_gemm/cuda_wgmma.cu": "sm_90a"}  # what other GPUs cannot run, not even as PTX
OPTIONS = ("--std=c++17", "--fmad=false", "--device-as-default-execution-space", "--ptxas-options=-v")
FEW_REGISTERS = "--ptxas-options=--register-usage-level=0"
ALIGNMENT = 64
NOT_FOUND = 3  # exit code: no NVRTC here
CACHE = "D2D_CUDA_CACHE"  # environment variable
_KEPT = 7 * 24 * 3600  # seconds


def nvrtc(target: str = PTX) -> ctypes.CDLL | None:
    """The library that compiles for a target; None where its wheel is not installed.

    CUDA 13's, as torch brings it too, stands in for CUDA 12's: then all that it makes wants a driver since 580.
    """
    return _library("cu13") if target in BY_CUDA_13 else _library("cuda_nvrtc") or _library("cu13")


def _library(home: str) -> ctypes.CDLL | None:
    """Of the wheel whose files are in the folder `home` of `nvidia`, with its builtins loaded before it."""
    found = importlib.util.find_spec("nvidia")
    for folder in found.submodule_search_locations if found else ():
        for builtins in sorted(Path(folder, home).glob("lib/libnvrtc-builtins.so*")):
            ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
        for library in sorted(Path(folder, home).glob("lib/libnvrtc.so*")):
            return ctypes.CDLL(str(library))
    return None


def options(target: str) -> tuple[str, ...]:
    return (*OPTIONS, FEW_REGISTERS) if target in BY_CUDA_13 else OPTIONS


def version(library: ctypes.CDLL) -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


class Compiled(NamedTuple):
    code: bytes  # machine code for sm_NN; else the PTX, with a zero at its end
    ptx: bytes
    log: str  # ptxas -v of machine code


def compiled(source: Path, target: str) -> Compiled:
    """One source for the target sm_NN or compute_NN. Raises RuntimeError with NVRTC's log."""
    library = nvrtc(target)
    names = (ctypes.c_char_p * len(HEADERS))(*(Path(header).name.encode() for header in HEADERS))
    texts = (ctypes.c_char_p * len(HEADERS))(*((PLUGINS / header).read_bytes() for header in HEADERS))
    program = ctypes.c_void_p()
    library.nvrtcCreateProgram(
        ctypes.byref(program), source.read_bytes(), source.name.encode(), len(HEADERS), texts, names
    )
    given = [option.encode() for option in (f"--gpu-architecture={target}", *options(target))]
    uselocale = ctypes.CDLL(None).uselocale
    uselocale.restype, uselocale.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    locale = uselocale(None)
    failed = library.nvrtcCompileProgram(program, len(given), (ctypes.c_char_p * len(given))(*given))
    uselocale(locale)  # NVRTC leaves the thread in the locale C, where Python reads and writes files as ASCII

    def result(what: str) -> bytes:
        size = ctypes.c_size_t()
        library[f"nvrtcGet{what}Size"](program, ctypes.byref(size))
        value = ctypes.create_string_buffer(size.value)
        library[f"nvrtcGet{what}"](program, value)
        return value.raw

    log = result("ProgramLog").rstrip(b"\0").decode()
    if failed:
        raise RuntimeError(f"{source}: NVRTC error {failed} for {target}\n{log}")
    ptx = result("PTX")
    code = result("CUBIN") if target.startswith("sm_") else ptx
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return Compiled(code, ptx, log)


def kernels_of(code: bytes) -> list[str]:
    """Names of the kernels in PTX, or, by the sections of their instructions, in machine code."""
    section = rb"\.text\.(\w+)\0" if code.startswith(b"\x7fELF") else rb"\.entry (\w+)"
    return sorted({name.decode() for name in re.findall(section, code)})


def cached(source: str, target: str, cache: Path | None) -> Compiled:
    """`compiled`, from the cache where there is one and nothing that it depends on has changed."""
    if cache is None:
        return compiled(PLUGINS / source, target)
    key = hashlib.sha256(repr((Compiled._fields, source, target, options(target), version(nvrtc(target)))).encode())
    for file in (source, *HEADERS):
        key.update((PLUGINS / file).read_bytes() + b"\0")
    path = cache / key.hexdigest()
    if not path.exists():
        made = compiled(PLUGINS / source, target)
        cache.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")  # another build may make the same
        lengths = f"{len(made.code)} {len(made.ptx)}\n".encode()
        part.write_bytes(lengths + made.code + made.ptx + made.log.encode())
        part.replace(path)
    path.touch()
    lengths, _, content = path.read_bytes().partition(b"\n")
    code, ptx = map(int, lengths.split())
    return Compiled(content[:code], content[code : code + ptx], content[code + ptx :].decode())


def image_of(source: str, target: str, cache: Path) -> bytes:
    """What the library holds of a source."""
    return cached(source, target, cache).code


def cache_folder() -> Path | None:
    """What $D2D_CUDA_CACHE names."""
    return Path(os.environ[CACHE]) if os.environ.get(CACHE) else None


def targets_of(source: str) -> list[str]:
    """What the library holds a source for."""
    if source in FOR_ONE_GPU:
        return [FOR_ONE_GPU[source]]
    return [*MACHINE_CODE, *(target for target in BY_CUDA_13 if nvrtc(target)), PTX]


def images(cache: Path) -> dict[tuple[str, str], bytes]:
    """Code by source and target; a process a core, the longest first. What was not used for a week leaves the cache."""
    order = sorted(SOURCES, key=lambda source: -(PLUGINS / source).stat().st_size)
    keys = [(source, target) for source in order for target in targets_of(source)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        codes = pool.map(image_of, *zip(*keys, strict=True), [cache] * len(keys))
        found = dict(zip(keys, codes, strict=True))
    for path in cache.iterdir():
        if path.stat().st_mtime < time.time() - _KEPT:
            path.unlink()
    return found


def embedded(found: dict[tuple[str, str], bytes], binary: Path) -> tuple[bytes, str]:
    """All images, aligned, and the header that embeds them from the file `binary`."""
    whole, rows = b"", []
    for (source, target), code in found.items():
        kind, _, capability = target.partition("_")
        flags = f"{kind == 'sm'}, {source in FOR_ONE_GPU}".lower()
        names = " ".join(kernels_of(code))
        rows.append(f'    {{{capability.rstrip("a")}, {flags}, {len(whole)}, "{names}"}},  // {source}')
        whole += code + b"\0" * (-len(code) % ALIGNMENT)
    return (
        whole,
        f"""// Made by plugins/cuda/compile.py; not kept in the repository.
// {hashlib.sha256(whole).hexdigest()}
#pragma once

#include <cstddef>

struct CudaImage {{
    int capability;        // in tenths
    bool is_machine_code;  // else PTX that ends with a zero
    bool for_one_gpu;      // of that capability, and no later one
    size_t at;             // in d2d_cuda_bytes
    const char* kernels;   // names between blanks
}};
static const CudaImage kCudaImages[] = {{
{chr(10).join(rows)}
}};
__asm__(
    ".pushsection .rodata\\n.balign {ALIGNMENT}\\nd2d_cuda_bytes:\\n"
    ".incbin \\"{binary.resolve()}\\"\\n.popsection\\n");
extern "C" __attribute__((visibility("hidden"))) const unsigned char d2d_cuda_bytes[];
""",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("header", type=Path)
    header = parser.parse_args().header
    if nvrtc() is None:
        print("NVRTC is not installed", file=sys.stderr)
        return NOT_FOUND
    for target in BY_CUDA_13:
        if nvrtc(target) is None:
            print(f"nvidia-cuda-nvrtc of CUDA 13 is not installed: PTX instead of {target}", file=sys.stderr)
    binary = header.with_suffix(".bin")
    whole, text = embedded(images(cache_folder() or header.with_suffix(".cache")), binary)
    if not header.exists() or not binary.exists() or header.read_text() != text:
        binary.write_bytes(whole)
        header.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
