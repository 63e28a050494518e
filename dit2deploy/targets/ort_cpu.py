"""Target `ort-cpu`: ONNX Runtime with our kernels as custom ops, weights in the kernels' own order and mapped."""

# onnx_ir types every name, shape and constant as optional.
# pyright: reportArgumentType=false, reportReturnType=false

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from dit2deploy.artefacts.bundle import Bundle, TargetRecord
from dit2deploy.artefacts.onnx_model import OnnxModel
from dit2deploy.base.errors import Misuse
from dit2deploy.targets import kernel
from dit2deploy.targets.graph import drop_native_bodies, save_graphs, use_kernel_layout
from dit2deploy.targets.ort import BySize, OrtRunner, open_graphs, runtime
from dit2deploy.targets.ort_attention import use_fused_attention
from dit2deploy.targets.reference import record, refuse_options
from dit2deploy.targets.target import Availability, Target

NAME = "ort-cpu"


def availability() -> Availability:
    """Building takes the kernel library; running takes ONNX Runtime, and the library that the bundle holds."""
    try:
        kernel.describe()
    except Misuse as error:
        return Availability(can_build=False, can_run=False, reason=error.cause, cure=error.cure)
    try:
        runtime()
    except Misuse as error:
        return Availability(can_build=True, can_run=False, reason=error.cause, cure=error.cure)
    return Availability(can_build=True, can_run=True)


def build(onnx: OnnxModel, *, root: Path, options: Mapping[str, Any]) -> TargetRecord:
    """Rewrites packed weights into the kernels' layout, drops the bodies of ops that have kernels, takes the runtime's
    own attention, adds the library."""
    refuse_options(NAME, options)
    if onnx.manifest.form != "fused":
        raise Misuse(
            f"{onnx.folder}: target {NAME} takes the fused form, this is {onnx.manifest.form}.",
            "Export with `--form fused`.",
        )

    def prepare(model: ir.Model) -> None:
        use_kernel_layout(model, kernel.KERNEL_ORDER)
        drop_native_bodies(model)
        use_fused_attention(model)

    folder = root / NAME
    folder.mkdir(exist_ok=True)
    model = save_graphs(onnx, folder, prepare)
    library = folder / kernel.LIBRARY_NAME
    shutil.copyfile(kernel.library_path(), library)
    made = record(onnx, model, folder, root=root, extra=(library,))
    details = {**made.details, "library_bytes": library.stat().st_size, "layout": kernel.KERNEL_ORDER}
    return made.model_copy(update={"details": details})


def open_engine(bundle: Bundle, *, threads: int | None = None, values: Sequence[str] = ()) -> OrtRunner | BySize:
    found = bundle.target(NAME)
    library = next((name for name in found.files if name.endswith(kernel.LIBRARY_NAME)), None)
    if library is None:
        raise Misuse(f"{bundle.folder}: holds no {kernel.LIBRARY_NAME}.", "Make it anew with `dit2deploy build`.")
    return open_graphs(bundle, NAME, threads=threads, values=values, library=bundle.path(library))


TARGET = Target(NAME, availability, build, open_engine)
