"""Target `tensorrt`: the full TensorRT 10 and 11, which build for the GPU at hand and need it for that.

Nothing here was ever run: it shares all but a few calls with tensorrt-rtx. The plugins were loaded into the registry of
the lean TensorRT 11.4, which builds nothing.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dit2deploy.artefacts.bundle import Bundle, TargetRecord
from dit2deploy.artefacts.onnx_model import OnnxModel
from dit2deploy.base.errors import Misuse
from dit2deploy.base.machine import versions
from dit2deploy.targets import cuda, kernel, trt_cache
from dit2deploy.targets.float_types import floats_of
from dit2deploy.targets.reference import refuse_options
from dit2deploy.targets.target import Availability, Runner, Target
from dit2deploy.targets.trt_build import Plan, build_engines, importable, version_of
from dit2deploy.targets.trt_runner import open_runner

NAME = "tensorrt"
MODULE = "tensorrt"
OLDEST = (10, 10)  # earlier ones prefer the bodies of functions to plugins
_INSTALL = "Install it: pip install 'dit2deploy[tensorrt]'."


def availability() -> Availability:
    """Building and running take the package and an NVIDIA GPU."""
    try:
        importable(MODULE, _INSTALL)
        if version_of(MODULE) < OLDEST:
            raise Misuse(f"{MODULE} is too old: {'.'.join(map(str, OLDEST))} or newer is needed.", _INSTALL)
        kernel.describe()
        cuda.capability()
    except Misuse as error:
        return Availability(can_build=False, can_run=False, reason=error.cause, cure=error.cure)
    return Availability(can_build=True, can_run=True)


def check(options: Mapping[str, Any]) -> None:
    refuse_options(NAME, options, known=("ranges", "floats", "timing_cache"))
    floats_of(NAME, options)


def build(onnx: OnnxModel, *, root: Path, options: Mapping[str, Any]) -> TargetRecord:
    """One engine a size, for the GPU at hand; TensorRT times its kernels on it, and remembers what it timed.

    Options: `ranges` (see build_engines); `floats`, the type of the activations; `timing_cache`, a folder in the place
    of the user's own (trt_cache).
    """
    check(options)
    floats = floats_of(NAME, options)
    able = availability()
    if not able.can_build:
        raise Misuse(f"{NAME} cannot build here: {able.reason}", able.cure)
    capability = cuda.capability()
    if floats == "bfloat16" and capability < "8":
        raise Misuse(f"target {NAME}: compute capability {capability} has no bfloat16.", "Take float16.")
    plan = Plan(f"sm{capability.replace('.', '')}", (), floats)
    place = Path(options.get("timing_cache") or trt_cache.folder())
    made = build_engines(
        onnx,
        root=root,
        target=NAME,
        module=MODULE,
        package=NAME,
        plans=[plan],
        ranges=options.get("ranges", {}),
        timing_cache=trt_cache.timing_file(place, NAME, versions(NAME)[NAME]),
        packed=capability != "9.0",  # whose wgmma, where it is asked for, reads codes a byte each
    )
    for engine in made.details["engines"].values():
        engine["compute_capabilities"] = [capability]
    return made


def open_engine(bundle: Bundle, *, threads: int | None = None, values: Sequence[str] = ()) -> Runner:
    """The engine for the GPU at hand; `threads` means nothing here. Raises Misuse where there is no GPU."""
    return open_runner(bundle, NAME, module=MODULE, values=values, cure=_INSTALL)


TARGET = Target(NAME, availability, check, build, open_engine)
