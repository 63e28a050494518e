"""Compiles the CUDA kernels to PTX with NVRTC and writes them as a C++ header: no CUDA toolkit, no GPU.

NVRTC comes from the wheel nvidia-cuda-nvrtc-cu12 (a build requirement) and is called through ctypes. The library holds
each source twice: compute_75 PTX runs on every GPU from Turing on, compute_80 PTX has the wider tensor instructions and
asynchronous copies of Ampere and later ones. The driver compiles what it is given once for the GPU at hand.

    python plugins/cuda/compile.py cuda_kernels.h
"""

import argparse
import ctypes
import importlib.util
import re
import sys
from pathlib import Path

PLUGINS = Path(__file__).resolve().parent.parent
SOURCES = (
    "ops/ada_ln_hadamard_quantize/cuda.cu",
    "ops/gelu_hadamard_quantize/cuda.cu",
    "ops/hadamard_quantize/cuda.cu",
    "ops/monarch/cuda.cu",
    "ops/multi_region_quantize/cuda.cu",
    "ops/quant_gemm/cuda.cu",
    "ops/quant_matmul/cuda.cu",
)
HEADERS = (
    "base/integers.h",
    "cuda/gpu.h",
    "formats/formats.h",
    "ops/gelu_hadamard_quantize/gelu.h",
    "ops/hadamard_quantize/cuda_rows.h",
    "ops/hadamard_quantize/cuda_warp_rows.h",
    "ops/hadamard_quantize/row_scale.h",
    "ops/quant_gemm/cuda_few_tokens.h",
    "ops/quant_gemm/cuda_parts.h",
    "ops/quant_gemm/cuda_tiles.h",
    "ops/quant_gemm/fragments.h",
)
CAPABILITIES = (75, 80)
OPTIONS = ("--std=c++17", "--fmad=false", "--device-as-default-execution-space")
NOT_FOUND = 3  # exit code: no NVRTC here


def nvrtc() -> ctypes.CDLL | None:
    """The library of the wheel, with its builtins loaded before it; None where the wheel is not installed.

    CUDA 12's wheel first: any driver since 550 reads its PTX. CUDA 13's, as torch brings it, wants a driver since 580.
    """
    try:
        found = importlib.util.find_spec("nvidia")
    except ModuleNotFoundError:
        return None
    for home in ("cuda_nvrtc", "cu13"):
        for folder in found.submodule_search_locations if found else ():
            for builtins in sorted(Path(folder, home).glob("lib/libnvrtc-builtins.so*")):
                ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
            for library in sorted(Path(folder, home).glob("lib/libnvrtc.so*")):
                return ctypes.CDLL(str(library))
    return None


def to_ptx(library: ctypes.CDLL, source: Path, capability: int) -> bytes:
    """PTX of one source for GPUs of that compute capability (in tenths) and later. Raises RuntimeError with the log."""
    names = (ctypes.c_char_p * len(HEADERS))(*(Path(header).name.encode() for header in HEADERS))
    texts = (ctypes.c_char_p * len(HEADERS))(*((PLUGINS / header).read_bytes() for header in HEADERS))
    program = ctypes.c_void_p()
    library.nvrtcCreateProgram(
        ctypes.byref(program), source.read_bytes(), source.name.encode(), len(HEADERS), texts, names
    )
    given = (f"--gpu-architecture=compute_{capability}", *OPTIONS)
    options = (ctypes.c_char_p * len(given))(*(option.encode() for option in given))
    failed = library.nvrtcCompileProgram(program, len(given), options)
    size = ctypes.c_size_t()
    if failed:
        library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        library.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"{source}: NVRTC error {failed}\n{log.value.decode()}")
    library.nvrtcGetPTXSize(program, ctypes.byref(size))
    ptx = ctypes.create_string_buffer(size.value)
    library.nvrtcGetPTX(program, ptx)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return ptx.value


def kernels_of(ptx: bytes) -> list[str]:
    return re.findall(r"\.entry (\w+)", ptx.decode(errors="replace"))


def header_of(modules: dict[tuple[str, int], bytes]) -> str:
    """A header with the PTX texts by source and capability, and the names of the kernels."""
    lines = ["// Made by plugins/cuda/compile.py; not kept in the repository.", "#pragma once", ""]
    lines += ["struct CudaModule {", "    int capability;", "    const unsigned char* ptx;  // ends with a zero", "};"]
    for index, ((source, capability), ptx) in enumerate(modules.items()):
        numbers = ",".join(map(str, ptx + b"\0"))
        lines += [f"// {source}, compute_{capability}", f"static const unsigned char kPtx{index}[] = {{{numbers}}};"]
    entries = ", ".join(f"{{{capability}, kPtx{index}}}" for index, (_, capability) in enumerate(modules))
    names = ", ".join(f'"{name}"' for name in sorted({name for ptx in modules.values() for name in kernels_of(ptx)}))
    lines += [f"static const CudaModule kCudaModules[] = {{{entries}}};"]
    return "\n".join([*lines, f"static const char* const kCudaKernels[] = {{{names}}};", ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("header", type=Path)
    header = parser.parse_args().header
    library = nvrtc()
    if library is None:
        print("NVRTC is not installed", file=sys.stderr)
        return NOT_FOUND
    modules = {
        (source, capability): to_ptx(library, PLUGINS / source, capability)
        for source in SOURCES
        for capability in CAPABILITIES
    }
    text = header_of(modules)
    if not header.exists() or header.read_text() != text:
        header.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
