"""Target `ort-cpu`: ONNX Runtime with our kernels as custom ops, weights in the kernels' own order and mapped."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dit2deploy.artefacts.bundle import Bundle, TargetRecord
from dit2deploy.artefacts.onnx_model import OnnxModel
from dit2deploy.targets import kernel, ort_build
from dit2deploy.targets.by_size import graphs_of, open_sizes
from dit2deploy.targets.ort import open_session, runtime
from dit2deploy.targets.reference import refuse_options
from dit2deploy.targets.target import Availability, Runner, Target, library_of

NAME = "ort-cpu"


def availability() -> Availability:
    """Building takes the kernel library; running takes ONNX Runtime, and the library that the bundle holds."""
    return ort_build.availability(runtime)


def check(options: Mapping[str, Any]) -> None:
    refuse_options(NAME, options)


def build(onnx: OnnxModel, *, root: Path, options: Mapping[str, Any]) -> TargetRecord:
    """Graphs of custom ops with weights in the order of the CPU kernels; there are no options."""
    check(options)
    made, _ = ort_build.build_custom_ops(onnx, root=root, target=NAME, layout=kernel.KERNEL_ORDER)
    return made


def open_engine(bundle: Bundle, *, threads: int | None = None, values: Sequence[str] = ()) -> Runner:
    library = library_of(bundle, NAME)
    return open_sizes(graphs_of(bundle, NAME), partial(open_session, threads=threads, values=values, library=library))


TARGET = Target(NAME, availability, check, build, open_engine)
