"""Target `reference`: the ONNX file through plain ONNX Runtime by its function bodies, without our kernels: slow."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir

from dit2deploy.artefacts.bundle import Bundle, TargetRecord
from dit2deploy.artefacts.onnx_model import DATA, OnnxModel
from dit2deploy.base.errors import Misuse
from dit2deploy.base.machine import versions
from dit2deploy.targets.by_size import graphs_of, open_sizes
from dit2deploy.targets.graph import bytes_by_part, save_graphs
from dit2deploy.targets.ort import open_session, runtime
from dit2deploy.targets.target import Availability, Runner, Target

NAME = "reference"


def availability() -> Availability:
    try:
        runtime()
    except Misuse as error:
        return Availability(can_build=True, can_run=False, reason=error.cause, cure=error.cure)
    return Availability(can_build=True, can_run=True)


def check(options: Mapping[str, Any]) -> None:
    refuse_options(NAME, options)


def build(onnx: OnnxModel, *, root: Path, options: Mapping[str, Any]) -> TargetRecord:
    """Copies the model, of any form, with its function bodies."""
    check(options)
    folder = root / NAME
    folder.mkdir(exist_ok=True)
    return record(onnx, save_graphs(onnx, folder, lambda model: None), folder, root=root, extra=())


def open_engine(bundle: Bundle, *, threads: int | None = None, values: Sequence[str] = ()) -> Runner:
    return open_sizes(graphs_of(bundle, NAME), partial(open_session, threads=threads, values=values, optimize=False))


def refuse_options(target: str, options: Mapping[str, Any], *, known: Sequence[str] = ()) -> None:
    """Raises Misuse for options that a target does not have."""
    unknown = [name for name in options if name not in known]
    if unknown:
        raise Misuse(f"target {target} has no option {', '.join(unknown)}.", "Leave it out.")


def record(onnx: OnnxModel, model: ir.Model, folder: Path, *, root: Path, extra: tuple[Path, ...]) -> TargetRecord:
    """What the graphs in the folder and their data file weigh, `model` being the first; "graph" is what is not its
    weights."""
    files = (*(folder / name for name in onnx.graphs.values()), folder / DATA)
    total = sum(file.stat().st_size for file in files)
    parts = bytes_by_part(model)
    parts["graph"] = total - sum(parts.values())
    return TargetRecord(
        engines={label: str((folder / name).relative_to(root)) for label, name in onnx.graphs.items()},
        files=tuple(str(file.relative_to(root)) for file in (*files, *extra)),
        weight_bytes=total,
        details={"parts": parts},
        versions=versions("onnx-ir", "onnxruntime", "onnxruntime-gpu"),
    )


TARGET = Target(NAME, availability, check, build, open_engine)
