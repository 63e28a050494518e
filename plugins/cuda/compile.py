"""Compiles the CUDA kernels to PTX with NVRTC and writes them as a C++ header: no CUDA toolkit, no GPU.

NVRTC comes from the wheel nvidia-cuda-nvrtc-cu12 (a build requirement) and is called through ctypes. compute_75 PTX runs
on every GPU from Turing on: the driver compiles it once for the GPU at hand.

    python plugins/cuda/compile.py cuda_kernels.h
"""

import argparse
import ctypes
import importlib.util
import sys
from pathlib import Path

PLUGINS = Path(__file__).resolve().parent.parent
SOURCES = (
    "ops/ada_ln_hadamard_quantize/cuda.cu",
    "ops/hadamard_quantize/cuda.cu",
    "ops/monarch/cuda.cu",
    "ops/multi_region_quantize/cuda.cu",
    "ops/quant_gemm/cuda.cu",
    "ops/quant_matmul/cuda.cu",
)
HEADERS = ("base/integers.h", "cuda/gpu.h", "formats/formats.h", "ops/hadamard_quantize/row_scale.h", "ops/hadamard_quantize/cuda_rows.h")
OPTIONS = ("--gpu-architecture=compute_75", "--std=c++17", "--fmad=false", "--device-as-default-execution-space")
NOT_FOUND = 3  # exit code: no NVRTC here


def nvrtc() -> ctypes.CDLL | None:
    """The library of the wheel, with its builtins loaded before it; None where the wheel is not installed."""
    try:
        found = importlib.util.find_spec("nvidia.cuda_nvrtc")
    except ModuleNotFoundError:
        return None
    for folder in found.submodule_search_locations if found else ():
        for builtins in Path(folder).glob("lib/libnvrtc-builtins.so*"):
            ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
        for library in sorted(Path(folder).glob("lib/libnvrtc.so*")):
            return ctypes.CDLL(str(library))
    return None


def to_ptx(library: ctypes.CDLL, source: Path) -> bytes:
    """PTX of one source. Raises RuntimeError with the compiler's log."""
    names = (ctypes.c_char_p * len(HEADERS))(*(Path(header).name.encode() for header in HEADERS))
    texts = (ctypes.c_char_p * len(HEADERS))(*((PLUGINS / header).read_bytes() for header in HEADERS))
    program = ctypes.c_void_p()
    library.nvrtcCreateProgram(
        ctypes.byref(program), source.read_bytes(), source.name.encode(), len(HEADERS), texts, names
    )
    options = (ctypes.c_char_p * len(OPTIONS))(*(option.encode() for option in OPTIONS))
    failed = library.nvrtcCompileProgram(program, len(OPTIONS), options)
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


def header_of(modules: dict[str, bytes]) -> str:
    """A header with one array of zero-terminated PTX texts."""
    lines = ["// Made by plugins/cuda/compile.py; not kept in the repository.", "#pragma once", ""]
    for index, (source, ptx) in enumerate(modules.items()):
        numbers = ",".join(map(str, ptx + b"\0"))
        lines += [f"// {source}", f"static const unsigned char kPtx{index}[] = {{{numbers}}};"]
    names = ", ".join(f"kPtx{index}" for index in range(len(modules)))
    return "\n".join([*lines, f"static const unsigned char* const kCudaModules[] = {{{names}}};", ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("header", type=Path)
    header = parser.parse_args().header
    library = nvrtc()
    if library is None:
        print("NVRTC is not installed", file=sys.stderr)
        return NOT_FOUND
    text = header_of({source: to_ptx(library, PLUGINS / source) for source in SOURCES})
    if not header.exists() or header.read_text() != text:
        header.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
