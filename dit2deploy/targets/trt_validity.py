"""Whether an engine can be opened here, asked before it is loaded, with the reason in words.

An engine opens in the release that built it and in no other, of TensorRT as of TensorRT-RTX.
"""

from pathlib import Path
from typing import Any

from dit2deploy.artefacts.bundle import Bundle
from dit2deploy.base.errors import Misuse
from dit2deploy.base.progress import note
from dit2deploy.targets.trt_engine import read_header

# Bits of EngineInvalidityDiagnostics by name: what is wrong, and what cures it.
_FAULTS = {
    "VERSION_MISMATCH": ("it is of another release", "Build the bundle anew with the installed one."),
    "UNSUPPORTED_CC": (
        "it is for other GPUs than this one",
        "Build with `--compute-capability` of this GPU.",
    ),
    "OLD_CUDA_DRIVER": ("the NVIDIA driver is too old", "Install a newer driver."),
    "OLD_CUDA_RUNTIME": ("the CUDA runtime is too old", "Install a newer CUDA runtime."),
    "INSUFFICIENT_GPU_MEMORY": ("the GPU has too little memory", "Free memory of the GPU, or take a larger one."),
    "MALFORMED_ENGINE": ("the file is no engine, or a broken one", "Build the bundle anew."),
    "CUDA_ERROR": ("CUDA does not work here", "Look at `nvidia-smi`, and install the driver anew."),
}


def check_release(bundle: Bundle, target: str, installed: str) -> None:
    """Raises Misuse for engines that another release of the target's package built than the one installed.

    By the numbers alone: a wheel's version may have a suffix that the library does not tell.
    """
    built = bundle.target(target).versions.get(target)
    if built is not None and _numbers(built) != _numbers(installed):
        raise Misuse(
            f"{bundle.folder}: its engines were built by {target} {built}, installed is {installed}; an engine opens "
            "only in the release that built it.",
            f"Build the bundle anew here, or pip install '{target}=={built}'.",
        )


def check_validity(trt: Any, runtime: Any, engine: Path, capability: str) -> None:
    """What TensorRT-RTX says of the engine's header. Raises Misuse for an engine that it would not open on this GPU."""
    with open(engine, "rb") as file:
        validity, bits = runtime.get_engine_validity(file.read(runtime.engine_header_size))
    found = [told for name, told in _FAULTS.items() if bits & int(getattr(trt.EngineInvalidityDiagnostics, name).value)]
    reason = "; ".join(fault for fault, _ in found) or "it tells no reason"
    if validity == trt.EngineValidity.INVALID:
        cure = found[0][1] if found else "Look at `nvidia-smi`, and build the bundle anew."
        raise Misuse(
            f"{engine}: TensorRT-RTX {trt.__version__} does not open it on this GPU, of compute capability "
            f"{capability}: {reason}. {_of(engine)}",
            cure,
        )
    if validity == trt.EngineValidity.SUBOPTIMAL:
        note(f"{engine}: is not at its best on this GPU: {reason}")


def _of(engine: Path) -> str:
    """What the header says by our own reading."""
    try:
        header = read_header(engine)
    except Misuse as error:
        return error.cause
    capabilities = ", ".join(header["compute_capabilities"]) or "no GPU that is known here"
    return f"The file was built by {header['tensorrt']} for {capabilities}."


def _numbers(version: str) -> list[str]:
    return version.split(".")[:4]
