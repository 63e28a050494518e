"""Target `tensorrt-rtx`: TensorRT-RTX engines with our kernels as plugins, built on any machine, run on an RTX GPU."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dit2deploy.artefacts.bundle import Bundle, TargetRecord
from dit2deploy.artefacts.onnx_model import OnnxModel
from dit2deploy.base.errors import Misuse
from dit2deploy.targets import cuda, kernel
from dit2deploy.targets.float_types import FLOAT32, floats_of
from dit2deploy.targets.reference import refuse_options
from dit2deploy.targets.target import Availability, Runner, Target
from dit2deploy.targets.trt_build import HALF, Plan, build_engines, importable, version_of
from dit2deploy.targets.trt_runner import open_runner

NAME = "tensorrt-rtx"
MODULE = "tensorrt_rtx"
CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0")
KNOWN = (*CAPABILITIES, "12.1")
OLDEST = (1, 7)  # earlier ones read no plugins
# Turing has no float32 matrix product in TensorRT-RTX, and no bfloat16.
HALF_ONLY = ("7.5",)
_INSTALL = "Install it: pip install 'dit2deploy[rtx]'."


def availability() -> Availability:
    """Building takes the package and the kernel library; running takes an NVIDIA GPU too."""
    try:
        importable(MODULE, _INSTALL)
        if version_of(MODULE) < OLDEST:
            raise Misuse(f"{MODULE} is too old: {'.'.join(map(str, OLDEST))} or newer is needed.", _INSTALL)
        kernel.describe()
    except Misuse as error:
        return Availability(can_build=False, can_run=False, reason=error.cause, cure=error.cure)
    try:
        cuda.capability()
    except Misuse as error:
        return Availability(can_build=True, can_run=False, reason=error.cause, cure=error.cure)
    return Availability(can_build=True, can_run=True)


def check(options: Mapping[str, Any]) -> None:
    refuse_options(NAME, options, known=("compute_capabilities", "ranges", "floats"))
    _plans(options)


def build(onnx: OnnxModel, *, root: Path, options: Mapping[str, Any]) -> TargetRecord:
    """One engine (a size) for all capabilities that take float32, one with float16 matrix products for the others.

    Options: `ranges` (see build_engines); `compute_capabilities`, names such as "8.6"; `floats`, the type of the
    activations, of which float16 is one engine for all. One engine serves several GPUs in the size of one: TensorRT-RTX
    compiles for the GPU at hand when the engine is first opened.
    """
    check(options)
    plans = _plans(options)
    ranges = options.get("ranges", {})
    return build_engines(onnx, root=root, target=NAME, module=MODULE, package=NAME, plans=plans, ranges=ranges)


def _plans(options: Mapping[str, Any]) -> list[Plan]:
    return plan_engines(options.get("compute_capabilities", CAPABILITIES), floats_of(NAME, options))


def plan_engines(capabilities: Sequence[str], floats: str = FLOAT32) -> list[Plan]:
    """Engines for those GPUs, labelled e.g. "sm80+86"; Misuse for a capability that TensorRT-RTX does not serve."""
    names = sorted(set(map(str, capabilities)), key=lambda name: KNOWN.index(name) if name in KNOWN else -1)
    unknown = [name for name in names if name not in KNOWN]
    if unknown or not names:
        told = f"knows no compute capability {unknown[0]}" if unknown else "needs a compute capability"
        raise Misuse(f"target {NAME} {told}.", f"Known: {', '.join(KNOWN)}.")
    if floats == "bfloat16" and names[0] in HALF_ONLY:
        raise Misuse(
            f"target {NAME}: compute capability {names[0]} has no bfloat16.",
            "Name others with `--compute-capability`, or take float16.",
        )
    if floats != FLOAT32:
        return [Plan(_label(names), tuple(names), floats)]
    full = tuple(name for name in names if name not in HALF_ONLY)
    plans = [Plan(_label(full), full)] if full else []
    half = tuple(name for name in names if name in HALF_ONLY)
    return plans + ([Plan(_label(half), half, HALF)] if half else [])


def open_engine(bundle: Bundle, *, threads: int | None = None, values: Sequence[str] = ()) -> Runner:
    """The engine for the GPU at hand; `threads` means nothing here. Raises Misuse where there is no GPU."""
    return open_runner(bundle, NAME, module=MODULE, values=values, cure=_INSTALL)


def _label(capabilities: Sequence[str]) -> str:
    return "sm" + "+".join(name.replace(".", "") for name in capabilities)


TARGET = Target(NAME, availability, check, build, open_engine)
