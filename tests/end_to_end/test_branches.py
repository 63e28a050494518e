"""A tiny DiT with low-rank and Monarch branches, from quantization to an engine that computes it."""

import onnx
import onnxruntime
import pytest

from dit2deploy.artefacts.policy import MonarchGrid
from dit2deploy.evaluate.fidelity import sqnr_db
from dit2deploy.models.load import load_transformer, open_model
from dit2deploy.nn.call import call_numpy
from dit2deploy.nn.convert import load_quantized
from dit2deploy.ops import DOMAIN
from dit2deploy.stages.build import build
from dit2deploy.stages.calibrate import calibrate
from dit2deploy.stages.export import export
from dit2deploy.stages.parity import parity
from dit2deploy.stages.quantize import quantize
from dit2deploy.stages.search import search
from dit2deploy.targets import by_name


@pytest.fixture(scope="module")
def made(tiny_dit_folder, tmp_path_factory):
    """Pipeline, calibration set, and a checkpoint: block linears have both kinds of branches, or Monarch alone."""
    root = tmp_path_factory.mktemp("branches")
    calibration = calibrate(tiny_dit_folder, root / "calibration", samples=2, steps=3)
    policy = search(tiny_dit_folder, root / "policy.json", recipe="w1.58a4", low_rank=2)
    role = open_model(tiny_dit_folder).family.role
    layers = {
        name: layer.model_copy(
            update={
                "monarch": MonarchGrid(4, 2, 1),
                "branch_init": "refit",
                "low_rank": 0 if name.endswith("net.2") else layer.low_rank,
            }
        )
        if role(name) == "block"
        else layer
        for name, layer in policy.layers.items()
    }
    policy = policy.model_copy(update={"layers": layers})
    return tiny_dit_folder, calibration, quantize(tiny_dit_folder, policy, calibration, root / "checkpoint")


@pytest.fixture(scope="module")
def fused(made, tmp_path_factory):
    return export(made[2].folder, tmp_path_factory.mktemp("branches") / "onnx")


@pytest.mark.parametrize("form", ["fused", "qdq"])
def test_plain_onnx_runtimes_compute_what_pytorch_does(made, fused, form, tmp_path):
    folder, _, checkpoint = made
    model = fused if form == "fused" else export(checkpoint.folder, tmp_path / "onnx", form=form)
    graph = onnx.load(model.path, load_external_data=False).graph
    branches = [node for node in graph.node if node.domain == DOMAIN and node.op_type == "MonarchAdd"]
    blocks = sum(layer.monarch is not None for layer in checkpoint.policy.layers.values())
    assert len(branches) == (blocks if form == "fused" else 0)
    network, family = load_transformer(folder)
    module = load_quantized(checkpoint, form=form)
    session = onnxruntime.InferenceSession(str(model.path), providers=["CPUExecutionProvider"])
    for batch in (2, 5):
        inputs = {
            name: value.numpy()
            for name, value in family.inputs(network.config, batch=batch, seed=7, second=True).items()
        }
        assert sqnr_db(call_numpy(module, inputs), session.run(None, inputs)[0]) > 40


def test_the_engine_computes_the_model(made, fused, tmp_path):
    folder, calibration, checkpoint = made
    if not by_name("ort-cpu").availability().can_run:
        pytest.skip("the kernel library is not here")
    bundle = build(fused.folder, tmp_path / "bundle", targets=["ort-cpu"], calibration=calibration.folder, model=folder)
    assert parity(bundle.folder, steps=2)["status"] == "passed"
    factors = sum(
        checkpoint.tensors.read(name).nbytes for name in checkpoint.tensors if name.rpartition(".")[2].startswith("mon")
    )
    assert bundle.manifest.size.parts["monarch"] == factors > 0
