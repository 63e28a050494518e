"""A bundle of a model that fits in a few lines of ONNX, for the target `reference`: no kernels, no torch."""

from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper, save_model

from dit2deploy.artefacts import schema
from dit2deploy.artefacts.bundle import CONFIG, MANIFEST, REFERENCE, SCHEDULER, Bundle, BundleManifest, SizeRecord
from dit2deploy.artefacts.onnx_model import DATA, MODEL, LayerRecord, OnnxManifest, OnnxModel, PortRecord
from dit2deploy.artefacts.onnx_model import MANIFEST as ONNX_MANIFEST
from dit2deploy.artefacts.policy import LayerPolicy, Policy
from dit2deploy.base.files import sha256_of_file, sha256_of_folder, write_json, write_tensors
from dit2deploy.targets import by_name

SIZE, CLASSES = 16, 10
LAYERS = ("blocks.0.attn.to_q", "blocks.0.ff", "blocks.1.attn.to_q", "blocks.1.ff")
INPUTS = (
    PortRecord(name="hidden_states", dtype="float32", shape=("batch", 1, SIZE, SIZE)),
    PortRecord(name="timestep", dtype="int64", shape=("batch",)),
    PortRecord(name="class_labels", dtype="int64", shape=("batch",)),
)
OUTPUTS = (PortRecord(name="sample", dtype="float32", shape=("batch", 1, SIZE, SIZE)),)


def onnx_model(folder: Path) -> OnnxModel:
    """sample = (hidden_states W) tanh(label + timestep): a model that asks for all of its inputs."""
    (folder / "scheduler").mkdir(parents=True)
    weight = numpy_helper.from_array((np.eye(SIZE) * 0.5).astype(np.float32), "weight")
    shape = numpy_helper.from_array(np.array([-1, 1, 1, 1], np.int64), "shape")
    nodes = [
        helper.make_node("MatMul", ["hidden_states", "weight"], ["mixed"], name="mix"),
        helper.make_node("Add", ["class_labels", "timestep"], ["both"], name="both"),
        helper.make_node("Cast", ["both"], ["asked"], name="cast", to=TensorProto.FLOAT),
        helper.make_node("Tanh", ["asked"], ["bounded"], name="tanh"),
        helper.make_node("Reshape", ["bounded", "shape"], ["factor"], name="reshape"),
        helper.make_node("Mul", ["mixed", "factor"], ["sample"], name="scale"),
    ]
    kinds = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
    ports = [
        [helper.make_tensor_value_info(port.name, kinds[port.dtype], port.shape) for port in side]
        for side in (INPUTS, OUTPUTS)
    ]
    graph = helper.make_graph(nodes, "tiny", *ports, [weight, shape])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    save_model(model, folder / MODEL)
    (folder / DATA).write_bytes(b"")
    write_json(folder / CONFIG, {"in_channels": 1, "sample_size": SIZE, "num_embeds_ada_norm": CLASSES})
    write_json(folder / SCHEDULER, {"_class_name": "DDIMScheduler", "num_train_timesteps": 100})
    manifest = OnnxManifest(
        form="float",
        model="Tiny",
        family="tiny",
        checkpoint="",
        checkpoint_sha256="",
        inputs=INPUTS,
        outputs=OUTPUTS,
        layers={name: LayerRecord(output="mixed", begin=0, end=SIZE) for name in LAYERS[:1]},
        opset=17,
        custom_opset=1,
    )
    schema.save(manifest, folder / ONNX_MANIFEST)
    return OnnxModel.load(folder)


def tiny_bundle(root: Path, *, config: dict | None = None, inputs: tuple[PortRecord, ...] = INPUTS) -> Bundle:
    """A whole bundle below `root`, with recorded steps, a policy, a scheduler and the float model as baseline."""
    source, folder = onnx_model(root / "onnx"), root / "bundle"
    folder.mkdir()
    record = by_name("reference").build(source, root=folder, options={})
    write_json(folder / CONFIG, config or source.config)
    write_json(folder / SCHEDULER, source.scheduler_config)
    Policy(
        method="rtn",
        model="Tiny",
        timestep_bounds=(100,),
        layers={
            name: LayerPolicy(weight="ternary", activation_bits=(4,), clip="gaussian", hadamard=16, low_rank=4)
            if index < 3
            else LayerPolicy(weight="float")
            for index, name in enumerate(LAYERS)
        },
    ).save(folder / "policy.json")
    generator = np.random.default_rng(0)
    write_tensors(
        folder / REFERENCE,
        {
            "input.hidden_states": generator.standard_normal((3, 2, 1, SIZE, SIZE), dtype=np.float32),
            "input.timestep": np.array([[90, 90], [50, 50], [10, 10]]),
            "input.class_labels": np.array([[1, 2]] * 3),
        },
    )
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    manifest = BundleManifest(
        model="Tiny",
        family="tiny",
        created="2026-01-01T00:00:00+00:00",
        inputs=inputs,
        outputs=OUTPUTS,
        layers=source.manifest.layers,
        targets={"reference": record},
        size=SizeRecord(float32=4096, parts={"ternary": 256, "scales": 64, "float": 320}),
        provenance={
            "model_path": str(root / "gone"),
            "checkpoint": str(root / "gone"),
            "float_onnx": str(source.folder),
            "float_onnx_sha256": sha256_of_folder(source.folder),
        },
        versions={"dit2deploy": "0"},
        sha256={name: sha256_of_file(folder / name) for name in files},
    )
    schema.save(manifest, folder / MANIFEST)
    return Bundle.load(folder)
