"""Target `reference`: the ONNX file through plain ONNX Runtime by its function bodies, without our kernels: slow."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from dit2deploy.artefacts.bundle import Bundle, TargetRecord
from dit2deploy.artefacts.onnx_model import MODEL, OnnxModel
from dit2deploy.base.errors import Misuse
from dit2deploy.base.machine import versions
from dit2deploy.targets.graph import bytes_by_part, save_streamed
from dit2deploy.targets.ort import OrtRunner, open_session, runtime
from dit2deploy.targets.target import Availability, Target

NAME = "reference"


def availability() -> Availability:
    try:
        runtime()
    except Misuse as error:
        return Availability(can_build=True, can_run=False, reason=error.cause, cure=error.cure)
    return Availability(can_build=True, can_run=True)


def build(onnx: OnnxModel, *, root: Path, options: Mapping[str, Any]) -> TargetRecord:
    """Copies the model, of any form, with its function bodies."""
    refuse_options(NAME, options)
    model = ir.load(onnx.path)
    path = root / NAME / MODEL
    path.parent.mkdir(exist_ok=True)
    save_streamed(model, path)
    return record(model, path, root=root, extra=())


def open_engine(bundle: Bundle, *, threads: int | None = None, values: Sequence[str] = ()) -> OrtRunner:
    engine = bundle.path(bundle.target(NAME).engines["onnx"])
    return open_session(engine, threads=threads, values=values, optimize=False)


def refuse_options(target: str, options: Mapping[str, Any]) -> None:
    """Raises Misuse for options of a target that has none."""
    if options:
        raise Misuse(f"target {target} has no option {', '.join(options)}.", "Leave it out.")


def record(model: ir.Model, path: Path, *, root: Path, extra: tuple[Path, ...]) -> TargetRecord:
    """What an ONNX file at `path` and its data file weigh; "graph" is what is not weights."""
    files = (path, path.with_name(path.name + ".data"))
    total = sum(file.stat().st_size for file in files)
    parts = bytes_by_part(model)
    parts["graph"] = total - sum(parts.values())
    return TargetRecord(
        engines={"onnx": str(path.relative_to(root))},
        files=tuple(str(file.relative_to(root)) for file in (*files, *extra)),
        weight_bytes=total,
        details={"parts": parts},
        versions=versions("onnx-ir", "onnxruntime"),
    )


TARGET = Target(NAME, availability, build, open_engine)
