"""Target `ort-cpu`: ONNX Runtime with our kernels as custom ops, weights in the kernels' own order and mapped."""

# onnx_ir types every name, shape and constant as optional.
# pyright: reportArgumentType=false, reportReturnType=false

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from dit2deploy.artefacts.bundle import Bundle, TargetRecord
from dit2deploy.artefacts.onnx_model import MODEL, OnnxModel
from dit2deploy.base.errors import Misuse
from dit2deploy.targets import kernel
from dit2deploy.targets.graph import DOMAIN, WS, W, columns_of, is_gemm, save_streamed, weight_format
from dit2deploy.targets.ort import OrtRunner, open_session, runtime
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
    """Rewrites packed weights into the kernels' layout, drops the bodies of ops that have kernels, adds the library."""
    refuse_options(NAME, options)
    if onnx.manifest.form != "fused":
        raise Misuse(
            f"{onnx.folder}: target {NAME} takes the fused form, this is {onnx.manifest.form}.",
            "Export with `--form fused`.",
        )
    model = ir.load(onnx.path)
    use_kernel_layout(model)
    drop_native_bodies(model)
    path = root / NAME / MODEL
    path.parent.mkdir(exist_ok=True)
    save_streamed(model, path)
    library = root / NAME / kernel.LIBRARY_NAME
    shutil.copyfile(kernel.library_path(), library)
    made = record(model, path, root=root, extra=(library,))
    details = {**made.details, "library_bytes": library.stat().st_size, "layout": kernel.KERNEL_ORDER}
    return made.model_copy(update={"details": details})


def open_engine(bundle: Bundle, *, threads: int | None = None, values: Sequence[str] = ()) -> OrtRunner:
    found = bundle.target(NAME)
    library = next((name for name in found.files if name.endswith(kernel.LIBRARY_NAME)), None)
    if library is None:
        raise Misuse(f"{bundle.folder}: holds no {kernel.LIBRARY_NAME}.", "Make it anew with `dit2deploy build`.")
    return open_session(
        bundle.path(found.engines["onnx"]), threads=threads, values=values, library=bundle.path(library)
    )


def use_kernel_layout(model: ir.Model) -> None:
    """Makes the words of every GEMM node layout 1; the words are made when they are written, one tensor at a time."""
    done: set[str] = set()
    for node in filter(is_gemm, model.graph):
        node.attributes["layout"] = ir.AttrInt64("layout", kernel.KERNEL_ORDER)
        words = node.inputs[W]
        if words.const_value is None:
            raise Misuse(
                f"node {node.name}: its weights are no constant.", "Make the file anew with `dit2deploy export`."
            )
        if words.name in done:
            continue
        done.add(words.name)
        fmt, packed, k = weight_format(node), words.const_value, columns_of(node)
        shape = kernel.relayout_shape(fmt, node.inputs[WS].shape[0], k)

        def relaid(packed=packed, fmt=fmt, k=k, name=words.name) -> ir.Tensor:
            return ir.tensor(kernel.relayout(fmt, np.asarray(packed.numpy()), k), name=name)

        words.const_value = ir.LazyTensor(relaid, dtype=ir.DataType.INT32, shape=ir.Shape(shape), name=words.name)
        words.shape = ir.Shape(shape)


def drop_native_bodies(model: ir.Model) -> None:
    """Leaves only the functions of ops that have no kernel: a missing library is then an error, not a slow surprise."""
    native = {entry["name"] for entry in kernel.describe()}
    for identifier in [key for key in model.functions if key[0] == DOMAIN and key[1] in native]:
        del model.functions[identifier]


TARGET = Target(NAME, availability, build, open_engine)
