"""dit2deploy inspect"""

from collections.abc import Sequence
from pathlib import Path

import click

from dit2deploy.artefacts import calibration_set, checkpoint, onnx_model, schema, unfinished
from dit2deploy.artefacts.bundle import PARITY, PROFILE, REPORT, Bundle
from dit2deploy.artefacts.device_table import DeviceTable
from dit2deploy.artefacts.onnx_model import size_label
from dit2deploy.artefacts.policy import Policy
from dit2deploy.artefacts.unfinished import Unfinished
from dit2deploy.base.errors import Misuse
from dit2deploy.base.files import read_json
from dit2deploy.base.shown import megabytes
from dit2deploy.cli import options
from dit2deploy.evaluate.words import counted

_EVIDENCE = {PARITY: "parity", PROFILE: "profile", REPORT: "report"}
_SAME_SEARCH = "the same `dit2deploy search` with the same --out; how many it takes follows from what it finds"
_SHOWN = 8  # names of what is missing


def _policy(policy: Policy) -> list[tuple[str, str]]:
    rows = [(f"{count} {what}", words.line) for what, words, count in counted(policy)]
    return [("method", policy.method), ("timestep groups", str(len(policy.timestep_bounds))), *rows]


def _policy_file(path: Path):
    policy = Policy.load(path)
    return "policy", policy.model_dump(mode="json"), _policy(policy)


def _device_table(path: Path):
    table = DeviceTable.load(path)
    rows = [("device", table.device), ("target", f"{table.target}, {table.instructions}, {table.threads} threads")]
    rows += [("batch", str(table.batch)), ("measured", table.date)]
    rows += [(str(time.linear), f"{time.ms:.3f} ms") for time in table.times]
    return "device table", table.model_dump(mode="json"), rows


def _front(path: Path):
    from dit2deploy.stages.search.front import Front

    front = schema.load(Front, path, cure="Write it anew with `dit2deploy search`.")
    rows = [("recipe", front.recipe), ("budget", f"{front.budget:g} {front.unit} {front.device}".strip())]
    rows += [
        (
            f"point {index}{', chosen' if index == front.chosen else ''}",
            f"{point.cost:g} {front.unit}, error {point.error:.4g}",
        )
        for index, point in enumerate(front.points)
    ]
    return "front of a search", front.model_dump(mode="json"), rows


def _bundle(path: Path):
    bundle = Bundle.load(path)
    manifest = bundle.manifest
    rows = [
        ("model", f"{manifest.model} ({manifest.family})"),
        ("created", manifest.created),
        ("size", f"{megabytes(manifest.size.float32)} float32, {manifest.size.ratio:.2f} times smaller here"),
        *((f"  {part}", megabytes(count)) for part, count in manifest.size.parts.items()),
        *((f"target {name}", ", ".join(record.engines)) for name, record in manifest.targets.items()),
        *((f"input {port.name}", f"{port.dtype} {list(port.shape)}") for port in manifest.inputs),
        *(_policy(bundle.policy) if bundle.policy else [("policy", "none: the checkpoint was gone at the build")]),
        *((name, f"not yet: dit2deploy {how} {path}") for name, how in _EVIDENCE.items() if not (path / name).exists()),
        ("files", f"{len(manifest.sha256)}, every hash as the manifest says"),
    ]
    return "bundle", manifest.model_dump(mode="json"), rows


def _calibration(path: Path):
    made = calibration_set.CalibrationSet.load(path)
    rows = [("model", made.manifest.model), ("calls", str(len(made))), ("guidance", str(made.manifest.guidance))]
    rows += [(name, f"{made.tensors.dtype(name)} {list(made.tensors.shape(name))}") for name in made.tensors]
    return "calibration set", made.manifest.model_dump(mode="json"), rows


def _checkpoint(path: Path):
    made = checkpoint.Checkpoint.load(path)
    size = (path / checkpoint.TENSORS).stat().st_size
    rows = [("model", made.manifest.model), ("size", megabytes(size)), ("tensors", str(len(made.tensors)))]
    if copies := made.tensors.stored_as:
        rows += [("  stored with an equal one", str(len(copies)))]
    if training := made.manifest.training:
        rows += [("trained", f"{training['steps']} steps in {training['seconds'] / 60:.0f} min")]
    return "quantized checkpoint", made.manifest.model_dump(mode="json"), rows + _policy(made.policy)


def _onnx(path: Path):
    manifest = onnx_model.OnnxModel.load(path).manifest
    rows = [("model", f"{manifest.model} ({manifest.family})"), ("form", manifest.form)]
    rows += [(f"input {port.name}", f"{port.dtype} {list(port.shape)}") for port in manifest.inputs]
    rows += [(f"output {port.name}", f"{port.dtype} {list(port.shape)}") for port in manifest.outputs]
    rows += [("graph of another size", size_label(size)) for size in manifest.sizes]
    rows += [("quantized layers", str(len(manifest.layers)))]
    return "ONNX model", manifest.model_dump(mode="json"), rows


def _engine(path: Path):
    from dit2deploy.targets.tensorrt_rtx import inspect_engine

    values = inspect_engine(path)
    return "TensorRT engine", values, [(name, str(value)) for name, value in values.items()]


def _model(path: Path):
    from dit2deploy.models.load import linears, open_model

    model = open_model(path)
    layers = linears(model)
    weights = sum(n * k for n, k in layers.values())
    rows = [("transformer", model.class_name), ("linear layers", str(len(layers))), ("their weights", f"{weights:,}")]
    return "model", {"class": model.class_name, "config": dict(model.config), "linears": layers}, rows


def _journal(path: Path):
    from dit2deploy.stages.search.journal import Journal

    count = len(Journal(path, stamp=None))
    return "journal of a search", {"measurements": count}, [("measurements", str(count)), ("goes on by", _SAME_SEARCH)]


def _unfinished(records: Sequence[Unfinished]) -> list[tuple[str, str]]:
    rows = []
    for record in records:
        rows.append((f"unfinished: {record.stage}", f"{record.done} of {record.total} {record.what} are done"))
        if record.missing:
            shown, more = record.missing[:_SHOWN], len(record.missing) - _SHOWN
            rows.append(("missing", ", ".join(shown) + (f" and {more} more" if more > 0 else "")))
        rows.append(("goes on by", record.command or "the same call of the library"))
    return rows


def _kind(path: Path) -> str:
    value = read_json(path)
    return value.get("kind", "") if isinstance(value, dict) else ""


@click.command()
@click.argument("artefact", type=options.PATH)
@options.common
def command(artefact: Path):
    """Explain any artefact: model, calibration set, policy, front of a search, device table, checkpoint, ONNX model,
    engine, bundle; and how far a stage came that was stopped, with the command that goes on.

    \b
    dit2deploy inspect build/demo
    dit2deploy inspect build/demo.work/policy.json
    dit2deploy inspect dit-xl-2-w1.58a4/      # not there yet: what of it is done
    """
    left = unfinished.read(artefact)
    readers = {"bundle": _bundle, "calibration_set": _calibration, "onnx_model": _onnx}
    if artefact.suffix == ".engine":
        kind, values, rows = _engine(artefact)
    elif artefact.name.endswith(".journal.jsonl") and artefact.is_file():
        kind, values, rows = _journal(artefact)
    elif artefact.is_file() and artefact.suffix == ".json":
        files = {"device_table": _device_table, "search_front": _front}
        kind, values, rows = files.get(_kind(artefact), _policy_file)(artefact)
    elif (artefact / checkpoint.MANIFEST).is_file():
        kind, values, rows = _checkpoint(artefact)
    elif (artefact / "manifest.json").is_file() and (found := _kind(artefact / "manifest.json")) in readers:
        kind, values, rows = readers[found](artefact)
    elif any((artefact / name).is_file() for name in ("config.json", "model_index.json")):
        kind, values, rows = _model(artefact)
    elif left:
        kind, values, rows = "unfinished", {}, []
    else:
        raise Misuse(
            f"{artefact}: is no artefact of dit2deploy.", "Give a folder or file that one of its commands wrote."
        )
    table = options.table(f"{artefact}: {kind}", ("", ""), [*rows, *_unfinished(left)])
    table.show_header = False
    table.columns[1].justify = "left"
    return {"kind": kind, **values, "unfinished": [record.model_dump(mode="json") for record in left]}, table
