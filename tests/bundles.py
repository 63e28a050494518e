"""A tiny random DiT and all that is made of it up to the ONNX model, once a session, for tests of what comes after."""

import functools
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from dit2deploy.artefacts import schema
from dit2deploy.artefacts.bundle import MANIFEST, Bundle
from dit2deploy.artefacts.checkpoint import MANIFEST as CHECKPOINT_MANIFEST
from dit2deploy.base.errors import Misuse
from dit2deploy.base.files import sha256_of_file, write_bytes, write_json
from dit2deploy.formats import TERNARY, pack, unpack
from dit2deploy.models.dit import DIT
from dit2deploy.models.load import open_model
from dit2deploy.stages.calibrate import calibrate
from dit2deploy.stages.export import export
from dit2deploy.targets import by_name, kernel
from dit2deploy.targets.graph import JOINED
from tests.packing import pack_checkpoint, policy_of, tiny_module

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "clip_sample": False,
}
_keep = []  # the temporary folder lives as long as the process


@dataclass(frozen=True)
class Sources:
    """Folders: a diffusers pipeline, its calibration set, a ternary 4-bit checkpoint with low rank, the fused ONNX."""

    pipeline: Path
    calibration: Path
    checkpoint: Path
    onnx: Path


@functools.cache
def sources() -> Sources:
    _keep.append(tempfile.TemporaryDirectory(prefix="dit2deploy-tests-"))
    root = Path(_keep[-1].name)
    made = Sources(root / "pipeline", root / "calibration", root / "checkpoint", root / "onnx")
    module = tiny_module(DIT)
    module.save_pretrained(made.pipeline / "transformer")
    write_json(made.pipeline / "model_index.json", {"_class_name": "DiTPipeline"})
    write_json(made.pipeline / "scheduler" / "scheduler_config.json", SCHEDULER)
    calibrate(made.pipeline, made.calibration, samples=2, steps=4)
    policy = policy_of(DIT, module, low_rank=4, clip="gaussian")
    checkpoint = pack_checkpoint(made.checkpoint, module, policy)
    told = {"model_path": str(made.pipeline), "model_sha256": open_model(made.pipeline).sha256}
    schema.save(checkpoint.manifest.model_copy(update=told), made.checkpoint / CHECKPOINT_MANIFEST)
    write_json(made.checkpoint / "scheduler" / "scheduler_config.json", SCHEDULER)
    export(made.checkpoint, made.onnx)
    return made


def engines() -> list[str]:
    """Targets whose engines run here; "reference" always does."""
    return ["reference", *(["ort-cpu"] if _has_library() else [])]


def _has_library() -> bool:
    try:
        return by_name("ort-cpu").availability().can_run
    except Misuse:
        return False


def move_one_weight(folder: Path, target: str, layer: str) -> None:
    """Moves one ternary code of a layer in a bundle's engine by one step, and vouches for the changed file anew."""
    bundle = Bundle.load(folder)
    place = bundle.manifest.layers[layer]
    engine = bundle.path(bundle.target(target).engines["onnx"])
    gemm = next(node for node in ir.load(engine).graph if node.outputs[0].name == place.output)
    k = gemm.inputs[0].shape[-1]
    stored = gemm.inputs[2].const_value
    source = ir.load(sources().onnx / "model.onnx").graph.initializers[gemm.inputs[2].name].const_value.numpy()
    codes = unpack(source, TERNARY, k).astype(int)
    codes[place.begin, 3] += 1 if codes[place.begin, 3] < 1 else -1
    words = pack(codes, TERNARY)
    if target == "ort-cpu":
        words = kernel.relayout("ternary", words, k)
    data = engine.with_name(stored.location)
    content = bytearray(data.read_bytes())
    content[stored.offset : stored.offset + stored.length] = np.ascontiguousarray(words).tobytes()
    assert bytes(content) != data.read_bytes()
    write_bytes(data, bytes(content))
    _vouch(folder, data)


def take_another_gate(folder: Path, target: str, layer: str, other: str) -> None:
    """A layer's GEMM with gate and residual, in a bundle's engine, takes the gate of another layer's."""
    bundle = Bundle.load(folder)
    engine = bundle.path(bundle.target(target).engines["onnx"])
    model = onnx.load(engine, load_external_data=False)
    first, second = (
        next(node for node in model.graph.node if f"{name}{JOINED}" in node.output) for name in (layer, other)
    )
    assert first.op_type.endswith("Residual") and first.input[-1] != second.input[-1]
    first.input[-1] = second.input[-1]
    write_bytes(engine, model.SerializeToString())
    _vouch(folder, engine)


def _vouch(folder: Path, changed: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["sha256"][str(changed.relative_to(folder))] = sha256_of_file(changed)
    write_json(folder / MANIFEST, manifest)
