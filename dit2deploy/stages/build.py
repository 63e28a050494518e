"""Stage build: from an ONNX model to a bundle with an engine for each target and what later stages need beside it."""

import datetime
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from dit2deploy.artefacts import schema
from dit2deploy.artefacts.bundle import (
    CONFIG,
    MANIFEST,
    REFERENCE,
    SCHEDULER,
    Bundle,
    BundleManifest,
    SizeRecord,
    TargetRecord,
)
from dit2deploy.artefacts.calibration_set import CalibrationSet
from dit2deploy.artefacts.checkpoint import Checkpoint
from dit2deploy.artefacts.onnx_model import OnnxModel, PortRecord
from dit2deploy.artefacts.policy import FILE as POLICY
from dit2deploy.base.errors import Misuse
from dit2deploy.base.files import sha256_of_file, sha256_of_folder, whole_folder, write_json, write_tensors
from dit2deploy.base.machine import versions
from dit2deploy.base.memory import require
from dit2deploy.base.progress import note, track
from dit2deploy.targets import Target, by_name
from dit2deploy.targets.graph import bytes_by_part, float32_bytes

RECORDED_STEPS = 5
RECORDED_BATCH = 4


def build(
    onnx: Path,
    out: Path,
    *,
    targets: Sequence[str],
    options: Mapping[str, Mapping[str, Any]] | None = None,
    calibration: Path | None = None,
    model: Path | None = None,
    float_onnx: Path | None = None,
    max_memory: int | None = None,
) -> Bundle:
    """Writes the bundle `out` with an engine of `onnx` for each of `targets`; `options` are each target's own.

    With `calibration`, single steps are recorded beside the engines: inputs of a few of its timesteps, outputs of the
    quantized PyTorch model (where its checkpoint still is) and of the full-precision `model`, so that a device without
    torch can check its engine; `max_memory` bounds what the process owns meanwhile, in bytes (None: what the machine
    has free). `float_onnx` is noted as the baseline of profile. Raises Misuse for a target that cannot be built here
    and for options that one does not take, before anything is written; nothing is left where a build fails.
    """
    source, out = OnnxModel.load(Path(onnx)), Path(out)
    options = options or {}
    chosen = _able(targets, options)
    checkpoint = _checkpoint(source)
    provenance = _provenance(source, checkpoint, calibration, model, float_onnx)
    with whole_folder(out, replaces=schema.holds(BundleManifest, MANIFEST)) as root:
        write_json(root / CONFIG, source.config)
        if source.scheduler_config is not None:
            (root / SCHEDULER).parent.mkdir()
            write_json(root / SCHEDULER, source.scheduler_config)
        if checkpoint is not None:
            shutil.copyfile(checkpoint.folder / POLICY, root / POLICY)
        if calibration is not None:
            _record(root / REFERENCE, source, CalibrationSet.load(Path(calibration)), checkpoint, model, max_memory)
        records = {
            target.name: target.build(source, root=root, options=options.get(target.name, {}))
            for target in track(chosen, "build")
        }
        files = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
        manifest = BundleManifest(
            model=source.manifest.model,
            family=source.manifest.family,
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            inputs=source.manifest.inputs,
            outputs=source.manifest.outputs,
            layers=source.manifest.layers,
            targets=records,
            size=_size(source, records, model),
            provenance=provenance,
            versions=versions("dit2deploy", "numpy", "onnx", "onnx-ir", "onnxruntime", "torch", "tensorrt-rtx"),
            sha256={name: sha256_of_file(root / name) for name in files},
        )
        schema.save(manifest, root / MANIFEST)
    return Bundle.load(out, check_hashes=False)


def _able(names: Sequence[str], options: Mapping[str, Mapping[str, Any]]) -> list[Target]:
    if not names:
        raise Misuse("build: no target is named.", "Name at least one, e.g. ort-cpu.")
    chosen = [by_name(name) for name in dict.fromkeys(names)]
    for target in chosen:
        able = target.availability()
        if not able.can_build:
            raise Misuse(f"{target.name} cannot be built here: {able.reason}", able.cure)
        target.check(options.get(target.name, {}))
    return chosen


def _checkpoint(source: OnnxModel) -> Checkpoint | None:
    """The checkpoint that the ONNX model was made from, where it still is; a float model has none."""
    folder = Path(source.manifest.checkpoint)
    if source.manifest.form == "float":
        return None
    if not folder.is_dir():
        note(f"build: {folder} is gone: the bundle gets no policy and no outputs of the quantized model")
        return None
    checkpoint = Checkpoint.load(folder)
    if checkpoint.sha256 != source.manifest.checkpoint_sha256:
        raise Misuse(f"{folder}: is not the checkpoint that {source.folder} was exported from.", "Export it anew.")
    return checkpoint


def _provenance(
    source: OnnxModel,
    checkpoint: Checkpoint | None,
    calibration: Path | None,
    model: Path | None,
    float_onnx: Path | None,
) -> dict[str, str]:
    made = {
        "onnx": str(source.folder.resolve()),
        "onnx_sha256": sha256_of_folder(source.folder),
        "checkpoint": source.manifest.checkpoint,
        "checkpoint_sha256": source.manifest.checkpoint_sha256,
    }
    if checkpoint is not None:
        made["policy_sha256"] = checkpoint.manifest.policy_sha256
        made["model_path"] = checkpoint.manifest.model_path
        made["model_sha256"] = checkpoint.manifest.model_sha256
        if training := checkpoint.manifest.training:
            made["training"] = f"{training['steps']} steps in {training['seconds'] / 60:.0f} min"
    if model is not None:
        from dit2deploy.models.hub import pinned
        from dit2deploy.models.load import open_model

        found = open_model(Path(model)).sha256
        if made.setdefault("model_sha256", found) != found:
            raise Misuse(
                f"{model}: is not the model that {source.manifest.checkpoint} was quantized from.", "Give that one."
            )
        made["model_path"] = str(Path(model).resolve())
        if name := pinned(Path(model)):
            made["model_hub"] = name
    if calibration is not None:
        made["calibration"] = str(Path(calibration).resolve())
        made["calibration_sha256"] = sha256_of_folder(Path(calibration))
    if float_onnx is not None:
        baseline = OnnxModel.load(Path(float_onnx))
        if baseline.manifest.form != "float":
            raise Misuse(f"{float_onnx}: is no float model.", "Make it with `dit2deploy export --form float`.")
        made["float_onnx"] = str(baseline.folder.resolve())
        made["float_onnx_sha256"] = sha256_of_folder(baseline.folder)
    return made


def _size(source: OnnxModel, records: Mapping[str, TargetRecord], model: Path | None) -> SizeRecord:
    """float32: of the full-precision weights. Parts: of the first target that knows them, else of the ONNX file."""
    lowered = ir.load(source.path)
    parts = next((record.details["parts"] for record in records.values() if "parts" in record.details), None)
    if parts is None:
        parts = bytes_by_part(lowered)
    if model is None:
        whole = float32_bytes(lowered)
    else:
        from dit2deploy.models.load import open_model

        tensors = open_model(Path(model)).tensors
        whole = 4 * sum(int(np.prod(tensors.shape(name), dtype=np.int64)) for name in tensors)
    return SizeRecord(float32=whole, parts={name: count for name, count in parts.items() if name != "graph"})


def _record(
    path: Path,
    source: OnnxModel,
    calibration: CalibrationSet,
    checkpoint: Checkpoint | None,
    model: Path | None,
    max_memory: int | None,
) -> None:
    """Writes inputs of RECORDED_STEPS timesteps, evenly spread over the set, and what PyTorch makes of them."""
    from dit2deploy.models import load
    from dit2deploy.models.stream import largest_layer
    from dit2deploy.nn.call import call_numpy
    from dit2deploy.nn.convert import load_quantized

    indices = np.linspace(0, len(calibration) - 1, min(RECORDED_STEPS, len(calibration))).round().astype(int)
    calls = [_call(calibration, int(index), source.manifest.inputs) for index in indices]
    tensors = {f"input.{name}": np.stack([call[name] for call in calls]) for name in calls[0]}
    networks = {}
    if checkpoint is not None:
        networks["quantized"] = lambda keep: load_quantized(checkpoint, keep=keep)
    if model is not None:
        networks["full_precision"] = lambda keep: load.load_transformer(Path(model), keep=keep)[0]
    with load.fake_parameters():
        # A packed layer is unpacked when it is called: then it is as large as the full-precision one.
        least = 3 * largest_layer(load.build(source.config, source.folder / CONFIG))
    for name, made in networks.items():
        network = made(require(f"build: a step of {source.manifest.model}", least, max_memory))
        tensors[name] = np.stack([call_numpy(network, call) for call in track(calls, f"record {name}")])
        del network
    write_tensors(path, tensors)


def _call(calibration: CalibrationSet, index: int, ports: Sequence[PortRecord]) -> dict[str, np.ndarray]:
    """One call of the set in the ports' dtypes; of a dynamic batch, RECORDED_BATCH samples from its whole width."""
    values = calibration.call(index)
    missing = [port.name for port in ports if port.name not in values]
    if missing:
        raise Misuse(
            f"{calibration.folder}: lacks the input {missing[0]}.", "Make it with `dit2deploy calibrate` of this model."
        )
    call = {}
    for port in ports:
        value = values[port.name].astype(port.dtype, copy=False)
        if port.shape and port.shape[0] == "batch":
            rows = np.linspace(0, len(value) - 1, min(RECORDED_BATCH, len(value))).round().astype(int)
            value = value[rows]
        call[port.name] = value
    return call
